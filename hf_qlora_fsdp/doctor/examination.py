"""The examination itself, in a process that may die of it.

What is examined can be broken in ways that no `try` survives: a library that crashes while it is imported, a driver
that never answers. So the checks run in a process of their own, `python -m hf_qlora_fsdp.doctor.examination NAMES`,
which reports each as a line of JSON; the one that asked (`examine`) uses nothing but the standard library and lives on:

    {"check": "torch", "began": true}
    {"check": "torch", "finding": {"level": "ok", "what": "torch 2.13.0 ..."}}
    {"check": "torch", "ended": true}

If the process dies or falls silent in the middle of a check, that is a finding too, and another process takes over
after it. A check whose foundations failed is left out, and a note says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from . import environment_checks, gpu_checks, host_checks, kernel_checks, live_test, software_checks
from .findings import Finding, error, note

_GRACE_SECONDS = 15
"""How long a check that was told to end may take to end its own processes, before it is killed."""


@dataclass(frozen=True)
class Check:
    """One question.

    Args:
        name (`str`): Its name, as printed.
        run (`Callable`): Answers it with findings.
        needs (`tuple[str, ...]`): Checks without whose success it makes no sense.
        first (`Callable`, *optional*): Answers what can be asked in any case. If it finds an error, that is all.
        timeout_seconds (`float`): How long it may take.
    """

    name: str
    run: Callable[[], Iterable[Finding]]
    needs: tuple[str, ...] = ()
    first: Callable[[], Iterable[Finding]] | None = None
    timeout_seconds: float = 120


_LIBRARIES: dict[str, tuple[str, ...]] = {
    "packaging": (),
    "psutil": (),
    "pyyaml": (),
    "dill": (),
    "torch": (),
    "safetensors": (),
    "transformers": ("torch",),
    "accelerate": ("torch",),
    "bitsandbytes": ("torch",),
    "peft": ("torch", "transformers", "accelerate"),
    "datasets": (),
    "trl": ("torch", "transformers", "accelerate"),
}
"""Each library with those that it cannot be imported without: their failure says all there is to say."""

_FOR_LOADING = ("packaging", "psutil", "torch", "safetensors", "transformers", "accelerate", "bitsandbytes", "peft")
LIVE_TEST = "live test"

CHECKS = (
    Check("python", software_checks.check_python),
    Check("environment", environment_checks.check_environment),
    *(
        Check(
            name,
            partial(software_checks.check_import, name),
            needs,
            first=partial(software_checks.check_version, name),
        )
        for name, needs in _LIBRARIES.items()
    ),
    Check("hf_qlora_fsdp", software_checks.check_package, tuple(_LIBRARIES)),
    Check("gpus", gpu_checks.check_gpus, ("torch",)),
    Check("links", gpu_checks.check_links, ("torch", "gpus")),
    Check("collectives", gpu_checks.check_collectives, ("torch",)),
    Check("quantisation", kernel_checks.check_bitsandbytes, ("torch", "bitsandbytes")),
    Check("kernels", kernel_checks.check_kernels, ("torch", "bitsandbytes", "quantisation")),
    Check("patches", software_checks.check_patches, ("packaging", "torch", "accelerate")),
    Check("memory", host_checks.check_memory, ("psutil", "torch")),
    Check("locked memory", host_checks.check_locked_memory, ("psutil", "torch")),
    Check("shared memory", host_checks.check_shared_memory),
    Check("disks", host_checks.check_disks),
    Check(
        LIVE_TEST,
        live_test.check_live,
        (*_FOR_LOADING, "gpus", "collectives"),
        timeout_seconds=live_test.TIMEOUT_SECONDS + 60,
    ),
)

Report = tuple[str, Finding]
"""The name of a check, and what it found."""


def examine(names: Sequence[str]) -> Iterator[Report]:
    """Run checks, each in a process that may die of it, and yield what they find as soon as they do.

    Args:
        names (`Sequence[str]`): Names of `CHECKS`, in their order.
    """
    checks = {check.name: check for check in CHECKS}
    pending, failed = list(names), set[str]()
    while pending:
        with _Patient(pending, failed) as patient:
            for check, finding in patient.answer(checks):
                if finding is None:
                    pending.remove(check)
                    continue
                if finding.level == "error":
                    failed.add(check)
                yield check, finding


class _Patient:
    """The process that runs checks, seen from the one that asks."""

    def __init__(self, names: Sequence[str], failed: Iterable[str]) -> None:
        self.names = names
        # What libraries print. The end of it explains a death.
        self.noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", __name__, json.dumps({"names": list(names), "failed": sorted(failed)})]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.noise)
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.put(line)
        self.lines.put(b"")

    def answer(self, checks: dict[str, Check]) -> Iterator[tuple[str, Finding | None]]:
        """Yield each check's findings, and `None` at its end; at the death of the process, what it died of."""
        current = self.names[0]
        while True:
            try:
                line = self.lines.get(timeout=checks[current].timeout_seconds)
            except queue.Empty:
                self.end()
                yield current, _explain_silence(current, checks[current].timeout_seconds)
                yield current, None
                return
            if not line:
                if self.process.wait() != 0:
                    yield current, _explain_death(current, self.process.returncode, self._last_noise())
                    yield current, None
                return
            said: dict[str, Any] = json.loads(line)
            current = said["check"]
            if "finding" in said:
                yield current, Finding(**said["finding"])
            elif "ended" in said:
                yield current, None

    def end(self) -> None:
        """End the process. It is asked first, so that it can end those that it has started."""
        for ask in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                ask()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_GRACE_SECONDS)

    def _last_noise(self) -> str:
        self.noise.seek(0)
        lines = [line for line in self.noise.read().decode(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-500:]

    def __enter__(self) -> _Patient:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.listener.join()
        self.noise.close()


def _explain_silence(check: str, seconds: float) -> Finding:
    return error(
        f"The check {check!r} gave no answer within {seconds:.0f} s.",
        "What it tries hangs, and so would a run: a driver, a file system over the network, or a GPU that others use.",
        "`nvidia-smi` and `dmesg` may say more. If both answer as they should, start the machine anew.",
    )


def _explain_death(check: str, code: int, last_noise: str) -> Finding:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return error(
        f"The check {check!r} {how}. Its last words: {last_noise or 'none'}",
        "A run would end like this, too. SIGKILL is what the kernel does when memory runs out; SIGSEGV and SIGILL come "
        "from native libraries that were built for another version of torch, of CUDA, or another processor.",
        "Reinstall the library that was tried, in its tested version; after SIGKILL, free memory.",
    )


# -- The process that is asked -----------------------------------------------------------------------------------------


def _answer_all(names: Sequence[str], failed: set[str], out: IO[str]) -> None:
    checks = {check.name: check for check in CHECKS}

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    for name in names:
        say(check=name, began=True)
        for finding in _answer(checks[name], failed):
            if finding.level == "error":
                failed.add(name)
            say(check=name, finding=finding.as_dict())
        say(check=name, ended=True)


def _answer(check: Check, failed: set[str]) -> Iterator[Finding]:
    if check.first is not None:
        yield from _guard(check.first)
        if check.name in failed:
            return
    missing = [name for name in check.needs if name in failed]
    if missing:
        failed.add(check.name)  # for those that need it in turn
        yield note("Not tried.", f"It needs {', '.join(missing)}.", "Mend what is said of that above, and ask again.")
        return
    yield from _guard(check.run)


def _guard(ask: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from ask()
    except Exception as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        yield error(
            f"The check itself failed: {type(problem).__name__}: {' '.join(str(problem).split())[:300]} "
            f"({where.filename}:{where.lineno})",
            "Something is in a state that nobody foresaw.",
            "If the other findings do not explain it, report it.",
        )


def main() -> None:
    """Answer what is asked in the first argument, on what was the standard output; whatever else prints goes aside."""
    asked = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        _answer_all(asked["names"], set(asked["failed"]), out)


if __name__ == "__main__":
    main()

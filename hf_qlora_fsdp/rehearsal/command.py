"""What `hf-qlora-fsdp rehearse` runs: the real trainer on the real shapes, before anything is downloaded.

    this process                       N processes, started by torch's agent, or all there is under torchrun
    launch    check, start them        QLoRAFSDPTrainer    random weights, made on the device     "load"
    explain   why one is gone          trainer.train       random tokens, one step                "first step"
    present   table, JSON, timeline                        the other steps                        "steady"

Nothing is simulated: the model is quantised, exchanged, sharded, offloaded and trained by the code that will train it,
for a few steps. Whether it fits, what it takes of card and host, and how fast it is, are measured, not predicted. Only
`config.json` is needed, since no figure depends on the values of weights or tokens.

Running out of memory is an answer here, not a failure. The rank that runs out writes down what was missing
(`shortage.py`) and ends, the agent ends the others, which may be waiting in a collective, and this process tells it. A
process that the kernel killed wrote nothing down; then its last heartbeat says what it was doing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..launch import default_num_processes, is_worker, run_workers
from ..units import format_bytes, parse_bytes

RESULT_FILE, FAILURE_FILES, HEARTBEATS = "result.json", "failure-{}.json", "heartbeat-{}"
_OTHERS_SECONDS = 10
"""How long a rank that failed because another one did waits for that one to write down why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the rehearsal."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder or config.json; nothing else of it is opened")
    parser.add_argument("--nproc", default="auto", metavar="N", help="processes (default: one a GPU, or 2 on CPU)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a rank takes at a time (%(default)s)")
    parser.add_argument("--grad-accumulation", type=int, default=1, help="times that it does so a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps, at least 2 (%(default)s)")
    parser.add_argument("--lora-r", type=int, default=16, help="rank of the adapter (%(default)s)")
    parser.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="what it adapts (all-linear)"
    )
    parser.add_argument("--param-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--attn-implementation", metavar="NAME", help="as in from_pretrained (the model's default)")
    parser.add_argument("--expert-chunk", metavar="SIZE", help="16-bit experts at a time (256MiB)")
    parser.add_argument("--no-fuse-lora", action="store_true", help="a 4-bit layer and its adapter one after the other")
    parser.add_argument("--use-liger-kernel", action="store_true", help="needs liger-kernel")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
    offload = parser.add_argument_group("offloading")
    offload.add_argument("--cpu-offload", action="store_true", help="frozen weights in host memory")
    offload.add_argument("--no-pin", action="store_true", help="in memory that may be swapped out")
    offload.add_argument("--cpu-offload-layers", type=int, metavar="K", help="offload K decoder layers only")
    offload.add_argument("--cpu-offload-dir", metavar="DIR", help="offload to files that are mapped into memory")
    offload.add_argument("--activation-offloading", action="store_true", help="activations in host memory")
    offload.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="keep all activations: faster, larger"
    )
    parser.add_argument("--replicate-layers", metavar="K", help="leave K decoder layers whole on every card, or all")
    parser.add_argument("--device-memory", metavar="SIZE", help="pretend that cards have only this, as 24GiB")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, or to stdout (-)")
    parser.add_argument("--plot", metavar="FILE", help="draw memory over time into this PNG; needs matplotlib")


# -- this process ----------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    """Run a rehearsal and present it.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
    Returns:
        `int`: Exit code: 0 if it fits, 1 if it does not, or an option cannot work.
    Raises:
        ValueError: An option is out of range, or there is no such model.
        OSError: The model's config cannot be had.
    """
    check(args)
    check_machine(args)
    from .report import check_outputs, present

    check_outputs(args.json, args.plot)
    find_config(args.model)
    if is_worker():
        outcome = take_part(args)
        return 0 if outcome is None else present(outcome, args.json, args.plot)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as folder:
        num_kills, began = _count_oom_kills(), time.time()
        num_processes = default_num_processes() if args.nproc == "auto" else int(args.nproc)
        with _stdout_to_stderr(args.json == "-"):
            handed_on = [json.dumps(vars_to_hand_on(args)), folder]
            failed = run_workers("hf_qlora_fsdp.rehearsal.command", handed_on, num_processes)
        outcome = collect(Path(folder), failed, num_processes, _count_oom_kills() - num_kills)
    if outcome is None:
        print("The rehearsal failed; the first error above says why.", file=sys.stderr)
        return 1
    outcome["seconds"] = time.time() - began
    return present(outcome, args.json, args.plot)


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything heavy is imported.

    Raises:
        ValueError: There is one.
    """
    reasons = {
        "steps": "the first step is no measure of the others",
        "cpu_offload_layers": "there is nothing to offload",
    }
    least_values = {"seq": 2, "batch": 1, "grad_accumulation": 1, "steps": 2, "lora_r": 1, "cpu_offload_layers": 1}
    for name, least in least_values.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            why = reasons.get(name, "there is nothing to train")
            raise ValueError(f"{given}: {why}. Give {least} or more.")
    if args.nproc != "auto" and (not args.nproc.isdecimal() or int(args.nproc) < 1):
        raise ValueError(f"--nproc {args.nproc} is no number of processes. Give 1 or more, or auto.")
    for option, size in {"--device-memory": args.device_memory, "--expert-chunk": args.expert_chunk}.items():
        if size is not None:
            try:
                parse_bytes(size)
            except ValueError as error:
                raise ValueError(f"{option} {error}") from None
    if args.device_memory is not None or args.activation_offloading:
        import torch

        if not torch.cuda.is_available():
            given = f"--device-memory {args.device_memory}" if args.device_memory else "--activation-offloading"
            raise ValueError(
                f"{given} is about the memory of a card, and this machine has none. Leave it out; the memory of the "
                "host can be limited by a cgroup."
            )
    args.cpu_offload = args.cpu_offload or args.cpu_offload_layers is not None or args.cpu_offload_dir is not None
    if args.no_pin and not args.cpu_offload:
        raise ValueError("--no-pin says how offloaded weights are kept, and none are. Add --cpu-offload.")
    replicated = args.replicate_layers
    if replicated not in (None, "all") and not (replicated.isdecimal() and int(replicated)):
        raise ValueError(f"--replicate-layers {replicated} is no number of decoder layers. Give 1 or more, or all.")
    if replicated and args.cpu_offload:
        raise ValueError(
            f"--replicate-layers {replicated} spends memory of the cards, which offloading is to save. Leave one out."
        )


def check_machine(args: argparse.Namespace) -> None:
    """Refuse what this machine has not got, before processes are started.

    Raises:
        ValueError: A folder or a package is missing.
    """
    if args.cpu_offload_dir is not None and not Path(args.cpu_offload_dir).is_dir():
        raise ValueError(
            f"--cpu-offload-dir {args.cpu_offload_dir} is no folder, so there is nowhere to put the shards. Make it, "
            "on a local disk, or name another."
        )
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "--use-liger-kernel needs liger-kernel, which is not installed. pip install liger-kernel, or leave it out."
        )


def find_config(model: str) -> None:
    """See that there is a config, and fetch it, so that the workers find it and only one process complains.

    Raises:
        ValueError: A folder or a path has none.
        OSError: The Hub has none, or cannot be reached.
    """
    path = Path(model)
    if path.is_file() or (path / "config.json").is_file():
        return
    if path.is_dir() or path.suffix == ".json" or model.startswith((".", "/", "~")):
        raise ValueError(
            f"{model!r} has no config.json, which says what shapes the weights have. Give the folder of a model, its "
            "config.json, or a Hub id."
        )
    from transformers.utils.hub import cached_file

    cached_file(model, "config.json")


def vars_to_hand_on(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the workers read."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "json", "plot", "nproc")}


def collect(folder: Path, failed: dict[int, int], num_processes: int, num_oom_kills: int) -> dict[str, Any] | None:
    """Return what the workers left behind, or what can be said of one that was killed. `None`: a traceback says more.

    Args:
        folder (`Path`): Where they left it.
        failed (`dict[int, int]`): Exit codes of those that failed.
        num_processes (`int`): How many there were.
        num_oom_kills (`int`): Processes that the kernel killed for memory meanwhile.
    """
    failures = [json.loads(file.read_text()) for file in folder.glob(FAILURE_FILES.format("*"))]
    if failures:
        return min(failures, key=lambda outcome: outcome["failure"]["time"])
    if not failed:
        return json.loads((folder / RESULT_FILE).read_text())
    killed = [index for index, code in failed.items() if code == -signal.SIGKILL]
    return explain_kill(folder, killed[0], num_processes, num_oom_kills) if killed else None


def explain_kill(folder: Path, killed: int, num_processes: int, num_oom_kills: int) -> dict[str, Any]:
    """Say in words why a rank is gone that could not say it itself."""
    beats = {}
    for index in range(num_processes):
        with contextlib.suppress(OSError, ValueError):
            phase, num_bytes = (folder / HEARTBEATS.format(index)).read_text().split("\n")[:2]
            beats[index] = phase, int(num_bytes)
    phase = beats.get(killed, ("start", 0))[0]
    held = ", ".join(f"rank {index} {format_bytes(num_bytes)}" for index, (_, num_bytes) in sorted(beats.items()))
    proof = (
        f"The kernel counts {num_oom_kills} such kill(s) since the start"
        if num_oom_kills
        else "The kernel counts no such kill, so somebody else may have sent the signal"
    )
    said = (
        f"Rank {killed} was killed (SIGKILL), which is what Linux does when the host or the cgroup runs out of memory. "
        f"{proof}. Host memory when last seen: {held or 'not measured yet'}."
    )
    failure = {"rank": killed, "phase": phase, "reason": "killed", "said": said, "place": "host", "time": time.time()}
    return {"fits": False, "failure": failure | {"asked_bytes": None, "missing_bytes": None, "advice": []}}


def _count_oom_kills() -> int:
    with open("/proc/vmstat") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


@contextlib.contextmanager
def _stdout_to_stderr(wanted: bool) -> Iterator[None]:
    """Let what workers print go to stderr, so that stdout holds nothing but JSON."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


# -- the N processes -------------------------------------------------------------------------------------------------


def take_part(args: argparse.Namespace, folder: Path | None = None) -> dict[str, Any] | None:
    """Rehearse, as one of the ranks.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`, checked.
        folder (`Path`, *optional*): Where the process that started this one looks for what becomes of it.
    Returns:
        `dict`, *optional*: What is to be presented: the result on rank 0, a failure on the rank that had it.
    """
    from ..ranks import rank
    from .workers import Rehearsal

    rehearsal = Rehearsal(args, folder and folder / HEARTBEATS.format(os.environ["RANK"]))
    try:
        outcome = rehearsal.run()
    except Exception as error:
        outcome = rehearsal.describe_failure(error)
        if outcome is None:
            # What a rank notices of another's failure is an error of a collective.
            if folder is None or not isinstance(error, RuntimeError) or not _another_failed(folder):
                raise
            os._exit(1)  # the other rank's reason is told, and a traceback of this one would hide it
    if outcome is not None and folder is not None:
        name = FAILURE_FILES.format(rank()) if "failure" in outcome else RESULT_FILE
        (folder / f"{name}.part").write_text(json.dumps(outcome))
        (folder / f"{name}.part").rename(folder / name)
    return outcome


def _another_failed(folder: Path) -> bool:
    """Wait a while for the reason of the rank that failed first, which this one only noticed."""
    deadline = time.monotonic() + _OTHERS_SECONDS
    while time.monotonic() < deadline:
        if any(folder.glob(FAILURE_FILES.format("*"))):
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    # The agent ends workers by signals: at once, though they may be waiting in a collective.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    told = take_part(argparse.Namespace(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    if told is not None and "failure" in told:
        sys.stdout.flush()
        os._exit(1)  # no farewell to ranks that wait in a collective

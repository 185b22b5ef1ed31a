"""Claim: models far larger than two cards train on them, their frozen weights on the card, in host memory or on disk.

Each row is one `hf-qlora-fsdp rehearse` (random weights of the real shapes, the real trainer) held to what it promises:
so much in use on a card, as the driver says, so many tokens a second, so much host memory. The card is capped at the
row's promise (`--device-memory`), so a run that ends has kept it. Figures are appended to `results.csv`; the table with
what was promised and what was measured is printed last.

    python benchmarks/offload.py --row 70b-resident --row 70b-pinned --minutes 20
    sudo python benchmarks/offload.py --row 70b-mapped --row 70b-swap --row 70b-swap-pinned --minutes 40

Rows that limit host memory make a control group (version 2 or 1) for their processes, and rows that swap a swap file;
both need root, and both are removed again, whatever happens. `--tiny` runs every row with a model of a few kilobytes
and without a cap, to see that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hf_qlora_fsdp.units import format_bytes, parse_bytes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "max_position_embeddings": 4096},
    "llama-3.1-405b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    | {"num_attention_heads": 128, "max_position_embeddings": 131072},
    "llama-3-8b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 8192},
    "tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "max_position_embeddings": 512},
}
GIB, GB = 2**30, 10**9
RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("date", "claim", "value", "unit", "command", "hardware", "versions")
STOP_SECONDS = 60
"""Kept back of `--minutes` for ending a run that takes too long, and for clearing up."""


@dataclass(frozen=True)
class Row:
    """One run and what is promised of it.

    Args:
        shape (`str`): Of `SHAPES`.
        words (`tuple[str, ...]`): Options of `rehearse`.
        used_bytes (`int`): At most so much in use on a card.
        tokens_per_second (`float`): At least so many, on each device.
        host_bytes (`int`, *optional*): At most so much host memory, of all ranks.
        host_limit (`str`, *optional*): Memory of the control group.
        swap (`str`, *optional*): Size of the swap file.
        mapped (`bool`): Whether shards are mapped from `--offload-dir`.
        fits (`bool`): Whether it shall end well; otherwise it shall say clearly why not.
    """

    shape: str
    words: tuple[str, ...]
    used_bytes: int
    tokens_per_second: float = 0
    host_bytes: int | None = None
    host_limit: str | None = None
    swap: str | None = None
    mapped: bool = False
    fits: bool = True


SEQ_2048 = ("--seq", "2048", "--activation-offloading")
OFFLOADED = (*SEQ_2048, "--batch", "2", "--cpu-offload")
UNPINNED = (*OFFLOADED, "--no-pin")
ROWS = {
    "8b-pinned": Row("llama-3-8b", OFFLOADED, 7 * GIB),
    "70b-resident": Row("llama-2-70b", (*SEQ_2048, "--batch", "1"), 23 * GIB, 1000),
    "70b-pinned": Row("llama-2-70b", OFFLOADED, 7 * GIB, 1050, 64 * GB),
    "70b-unpinned": Row("llama-2-70b", UNPINNED, 7 * GIB, 800, 64 * GB),
    "70b-mapped": Row("llama-2-70b", OFFLOADED, 7 * GIB, host_limit="32GB", mapped=True),
    "70b-swap": Row("llama-2-70b", UNPINNED, 7 * GIB, host_limit="32GB", swap="64GiB"),
    "70b-swap-pinned": Row("llama-2-70b", OFFLOADED, 7 * GIB, host_limit="32GB", swap="64GiB", fits=False),
    "405b": Row(
        "llama-3.1-405b",
        ("--seq", "1024", "--batch", "1", "--activation-offloading", "--cpu-offload", "--no-pin"),
        16 * GIB,
        40,
        230 * GB,
    ),
}


def main() -> int:
    """Run the rows, record them, and say what was kept."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleared up
    deadline = time.monotonic() + options.minutes * 60
    table, kept = [], True
    for name in options.row:
        if deadline - time.monotonic() < 2 * STOP_SECONDS:
            table.append((name, "no time left", "", "", "not run"))
            kept = False
            continue
        outcome = run(name, options, deadline)
        faults = judge(ROWS[name], outcome, options)
        kept = kept and not faults
        record(name, outcome, options)
        table.append(summarize(name, ROWS[name], outcome, faults))
    head = ("row", "used on a card", "tokens/s/GPU", "host", "result")
    widths = [max(len(line[column]) for line in [head, *table]) for column in range(len(head))]
    for line in [head, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0 if kept else 1


def parse_arguments() -> argparse.Namespace:
    """Return the options of this run. What follows `--` goes to `rehearse` as it is, and wins."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", choices=ROWS, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="end by then, all rows together (%(default)s)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device-memory", metavar="SIZE", help="cap cards at this instead of at the row's promise")
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="limit all ranks to this, in a control group of their own"
    )
    parser.add_argument("--swap", metavar="SIZE", help="add a swap file of this size")
    parser.add_argument("--swap-dir", type=Path, default=Path("/var/tmp"), help="on a local disk (%(default)s)")
    parser.add_argument("--offload-dir", type=Path, default=Path("/var/tmp"), help="for mapped shards (%(default)s)")
    parser.add_argument("--plots", type=Path, help="folder for pictures of memory over time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead, no cap and no promises")
    parser.add_argument("extra", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- one row ---------------------------------------------------------------------------------------------------------


def run(name: str, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rehearse one row.

    Returns:
        `dict`: What `rehearse --json` wrote, with `seconds` and `group_peak_bytes`; or `{"fits": False, "said": ...}`.
    """
    row = ROWS[name]
    host_limit, swap = options.host_memory or row.host_limit, options.swap or row.swap
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-")))
        shape = "tiny" if options.tiny else row.shape
        config = folder / shape / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(SHAPES[shape]))
        command = [sys.executable, "-m", "hf_qlora_fsdp.cli", *arguments(row, options), "--json", f"{folder}/out.json"]
        command.insert(4, str(config))
        if row.mapped:
            shards = stack.enter_context(tempfile.TemporaryDirectory(prefix="shards-", dir=options.offload_dir))
            command += ["--cpu-offload-dir", shards]
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
            command += ["--plot", str(options.plots / f"{name}.png")]
        command += options.extra
        if swap:
            stack.enter_context(swap_file(options.swap_dir, parse_bytes(swap)))
        group = None
        if host_limit:
            limits = limited_memory(parse_bytes(host_limit), parse_bytes(swap) if swap else 0)
            group = stack.enter_context(limits)
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        ended = run_command(command, group, deadline - STOP_SECONDS)
        outcome = {"fits": False, "said": "failed without a result; the error above says why"}
        if not ended:
            outcome["said"] = "did not end in time"
        elif (folder / "out.json").exists():
            outcome = json.loads((folder / "out.json").read_text())
        peak = group.peak_bytes() if group else None
        return outcome | {"seconds": time.monotonic() - began, "group_peak_bytes": peak}


def arguments(row: Row, options: argparse.Namespace) -> list[str]:
    """Return the row as arguments of the command line, less the model and the places that files go to."""
    if not options.tiny:
        limit = options.device_memory or f"{row.used_bytes // GIB}GiB"
        return ["rehearse", *row.words, "--steps", str(options.steps), "--device-memory", limit]
    words = [word for word in row.words if word != "--activation-offloading"]  # which needs a card
    words[words.index("--seq") + 1] = "64"
    return ["rehearse", *words, "--steps", str(options.steps)]


def run_command(command: list[str], group: MemoryGroup | None, deadline: float) -> bool:
    """Run a command, in a control group if there is one. Returns whether it ended by itself before the deadline."""
    process = subprocess.Popen(group.enter(command) if group else command)
    try:
        process.wait(timeout=max(1, deadline - time.monotonic()))
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a command and its workers: by asking, then by force."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)  # the command ends its workers
    _, alive = psutil.wait_procs(everybody, timeout=STOP_SECONDS / 3)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    process.wait()


def judge(row: Row, outcome: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Return what was promised and not kept."""
    if not row.fits and not options.tiny:
        failure = outcome.get("failure", {})
        refused = failure.get("place") == "host" or "on the host" in failure.get("said", "")
        return [] if refused else ["the host should have been too small, and said so"]
    if not outcome["fits"]:
        failure = outcome.get("failure")
        return [f"{failure['phase']}: {failure['reason']}" if failure else outcome.get("said", "over the cap")]
    if options.tiny:
        return []
    faults = []
    if peak(outcome, "used") > row.used_bytes:
        faults.append(f"more than {format_bytes(row.used_bytes)} used")
    if outcome["tokens_per_second_per_device"] < row.tokens_per_second:
        faults.append(f"fewer than {row.tokens_per_second:,} tokens/s")
    if row.host_bytes is not None and peak(outcome, "host") > row.host_bytes:
        faults.append(f"more than {row.host_bytes / GB:.0f} GB of the host")
    return faults


def peak(outcome: dict[str, Any], name: str) -> int:
    """Return the peak over all phases."""
    return max(phase["peaks"][name] for phase in outcome["phases"])


def summarize(name: str, row: Row, outcome: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    """Return a line of the table."""
    verdict = f"NOT KEPT: {', '.join(faults)}" if faults else "kept" if row.fits else "refused, as it should be"
    if outcome.get("model", "").endswith("tiny/config.json") and not faults:
        verdict = "ran, with a tiny model"
    if not outcome.get("phases"):
        return name, "", "", "", verdict
    used = f"{format_bytes(peak(outcome, 'used'))} (at most {format_bytes(row.used_bytes)})"
    rate = f"{outcome['tokens_per_second_per_device']:,.0f}" if outcome["fits"] else "-"
    floor = f" (at least {row.tokens_per_second:,})" if row.tokens_per_second else ""
    return name, used, rate + floor, format_bytes(peak(outcome, "host")), verdict


def record(name: str, outcome: dict[str, Any], options: argparse.Namespace) -> None:
    """Append the figures to the results."""
    if "versions" not in outcome:
        return  # nothing was measured
    figures: dict[str, tuple[float, str]] = {"fits": (float(outcome["fits"]), "1 or 0")}
    if outcome.get("phases"):
        figures["used"] = peak(outcome, "used") / GIB, "GiB"
        figures["allocated"] = peak(outcome, "allocated") / GIB, "GiB"
        for kind in ("host", "anonymous", "file", "shared", "pinned"):
            figures[f"host memory, {kind}" if kind != "host" else kind] = peak(outcome, kind) / GIB, "GiB"
    if outcome["group_peak_bytes"] is not None:
        figures["control group"] = outcome["group_peak_bytes"] / GIB, "GiB"
    if outcome["fits"]:
        figures["load"] = outcome["load_seconds"], "s"
        figures["step"] = outcome["seconds_per_step"], "s"
        figures["rate"] = outcome["tokens_per_second_per_device"], "tokens/s/GPU"
        figures["matmul share"] = 100 * outcome["matmul_share"], "%"
    words = ["python benchmarks/offload.py --row", name, "--steps", str(options.steps)]
    for option in ("device_memory", "host_memory", "swap"):
        if getattr(options, option):
            words += [f"--{option.replace('_', '-')}", getattr(options, option)]
    words += ["--tiny"] * options.tiny + (["--", *options.extra] if options.extra else [])
    command = " ".join(words)
    hardware = f"{outcome['world_size']}x {outcome['device']}"
    versions = " ".join(f"{package}=={version}" for package, version in outcome["versions"].items())
    new = not options.results.exists()
    with options.results.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(COLUMNS)
        for claim, (value, unit) in figures.items():
            today = datetime.date.today().isoformat()
            writer.writerow([today, f"{name}: {claim}", f"{value:.4g}", unit, command, hardware, versions])


# -- limits of the host ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that limits the memory of what runs in it.

    Args:
        folder (`Path`): Where the kernel shows it.
        peak_file (`str`): Its file with the most that was in use, cached pages of files included.
    """

    folder: Path
    peak_file: str

    def enter(self, command: list[str]) -> list[str]:
        """Return a command that runs another inside."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *command]

    def peak_bytes(self) -> int | None:
        """Return the most that was in use, where the kernel says it (from Linux 5.19 on in version 2)."""
        file = self.folder / self.peak_file
        return int(file.read_text()) if file.exists() else None


@contextlib.contextmanager
def limited_memory(memory_bytes: int, swap_bytes: int) -> Iterator[MemoryGroup]:
    """Make a control group with so much memory and swap, and remove it.

    Source:
        https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    folder = (root if second else root / "memory") / f"hf-qlora-fsdp-{os.getpid()}"
    if second:
        limits = {"memory.max": memory_bytes, "memory.swap.max": swap_bytes}
    else:  # the second limit is of both together, and missing where swap is not counted
        limits = {"memory.limit_in_bytes": memory_bytes, "memory.memsw.limit_in_bytes": memory_bytes + swap_bytes}
    try:
        if second:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        for name, value in limits.items():
            if "memsw" in name and not (folder / name).exists():
                print("This kernel does not count swap by group: it is limited by what the host has.", flush=True)
            else:
                (folder / name).write_text(str(value))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise SystemExit(
            f"Host memory cannot be limited here: {error}. Control groups are made by root, on a machine or in a "
            "container where /sys/fs/cgroup is writable. Run as root there, or leave such rows out."
        ) from error
    try:
        yield MemoryGroup(folder, "memory.peak" if second else "memory.max_usage_in_bytes")
    finally:
        for _ in range(100):  # processes that were just ended leave it in their own time
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
        else:
            print(f"{folder} could not be removed: something still runs in it.", file=sys.stderr)


@contextlib.contextmanager
def swap_file(folder: Path, num_bytes: int) -> Iterator[None]:
    """Make a swap file, use it, and remove it."""
    file = folder / f"hf-qlora-fsdp-{os.getpid()}.swap"
    try:
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        file.chmod(0o600)
        for command in (["mkswap", str(file)], ["swapon", str(file)]):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        file.unlink(missing_ok=True)
        said = getattr(error, "stderr", None) or error
        raise SystemExit(
            f"A swap file of {format_bytes(num_bytes)} cannot be used in {folder}: {said}. It takes root, room, and a "
            "local disk (ext4 or xfs, not an overlay of a container). Name another folder with --swap-dir."
        ) from error
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(file)], check=False)
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

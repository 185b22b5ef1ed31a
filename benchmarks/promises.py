"""Runs that are held to what they promise: `hf-qlora-fsdp rehearse` with a cap, and a table of what came of it.

A row is one run and its promise: so much in use on a card, as the driver says, so many tokens a second, so much host
memory, and loading at no higher a peak than training. The card is capped at the row's promise (`--device-memory`), so a
run that ends has kept it. Figures are appended to `results.csv`; the table with what was promised and what was measured
is printed last. `offload.py` and `experts.py` name the rows.

`--tiny` runs every row with a model of a few kilobytes and without a cap, to see that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from host_limits import MemoryGroup, limited_memory, swap_file

from hf_qlora_fsdp.units import format_bytes, parse_bytes

GIB, GB = 2**30, 10**9
RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("date", "claim", "value", "unit", "command", "hardware", "versions")
_VARIABLES = re.compile("NCCL_(?!VERSION|.*FILE)|PYTORCH_(CUDA_)?ALLOC_CONF")
"""Those that change what lies beside torch's tensors, and what holes there are between them."""
STOP_SECONDS = 60
"""Kept back of `--minutes` for ending a run that takes too long, and for clearing up."""


@dataclass(frozen=True)
class Row:
    """One run and what is promised of it.

    Args:
        shape (`str`): Of the script's shapes.
        words (`tuple[str, ...]`): Options of `rehearse`.
        used_bytes (`int`, *optional*): At most so much in use on a card; without it, there is no cap.
        tokens_per_second (`float`): At least so many, on each device.
        host_bytes (`int`, *optional*): At most so much host memory, of all ranks.
        host_limit (`str`, *optional*): Memory of the control group.
        swap (`str`, *optional*): Size of the swap file.
        mapped (`bool`): Whether shards are mapped from `--offload-dir`.
        fits (`bool`): Whether it shall end well; otherwise it shall say clearly why not.
        loads_below (`bool`): Whether no more shall be in use while loading than in steady training.
        steps (`int`): Steps, where `--steps` does not say otherwise: as many as ten minutes allow.
        tiny (`str`): The shape that stands for this one with `--tiny`.
        script (`str`, *optional*): A script beside this one that takes the options of `rehearse` and writes what it
            writes, to be run instead.
    """

    shape: str
    words: tuple[str, ...]
    used_bytes: int | None = None
    tokens_per_second: float = 0
    host_bytes: int | None = None
    host_limit: str | None = None
    swap: str | None = None
    mapped: bool = False
    fits: bool = True
    loads_below: bool = False
    steps: int = 8
    tiny: str = "tiny"
    script: str | None = None


@dataclass(frozen=True)
class Claim:
    """A script: what it claims, and the rows that show it.

    Args:
        file (`str`): The script's own.
        title (`str`): What it says of itself.
        rows (`dict[str, Row]`): By name.
        shapes (`dict[str, dict[str, Any]]`): Model configs, by name.
    """

    file: str
    title: str
    rows: dict[str, Row]
    shapes: dict[str, dict[str, Any]]


def main(claim: Claim) -> int:
    """Run the rows, record them, and say what was kept."""
    options = parse_arguments(claim)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleared up
    deadline = time.monotonic() + options.minutes * 60
    table, kept = [], True
    for name in options.row:
        if deadline - time.monotonic() < 2 * STOP_SECONDS:
            table.append((name, "no time left", "", "", "not run"))
            kept = False
            continue
        outcome = run(claim, name, options, deadline)
        faults = judge(claim.rows[name], outcome, options)
        kept = kept and not faults
        record(claim, name, outcome, options)
        table.append(summarize(name, claim.rows[name], outcome, faults, options))
    head = ("row", "used on a card", "tokens/s/GPU", "host", "result")
    widths = [max(len(line[column]) for line in [head, *table]) for column in range(len(head))]
    for line in [head, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0 if kept else 1


def parse_arguments(claim: Claim) -> argparse.Namespace:
    """Return the options of this run. What follows `--` goes to `rehearse` as it is, and wins."""
    parser = argparse.ArgumentParser(description=claim.title)
    parser.add_argument("--row", action="append", choices=claim.rows, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="end by then, all rows together (%(default)s)")
    parser.add_argument("--steps", type=int, help="(8, or fewer for rows whose steps are long)")
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


def run(claim: Claim, name: str, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rehearse one row.

    Returns:
        `dict`: What `rehearse --json` wrote, with `seconds` and `group_peak_bytes`; or `{"fits": False, "said": ...}`.
    """
    row = claim.rows[name]
    host_limit, swap = options.host_memory or row.host_limit, options.swap or row.swap
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promise-")))
        shape = row.tiny if options.tiny else row.shape
        config = folder / shape / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(claim.shapes[shape]))
        script = [str(Path(__file__).with_name(row.script))] if row.script else ["-m", "hf_qlora_fsdp.cli", "rehearse"]
        command = [sys.executable, *script, str(config), *arguments(row, options), "--json", f"{folder}/out.json"]
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
        limit = options.device_memory or (format_bytes(row.used_bytes) if row.used_bytes else None)
        return [*row.words, "--steps", str(num_steps(row, options)), *(["--device-memory", limit] if limit else [])]
    words = [word for word in row.words if word != "--activation-offloading"]  # which needs a card
    words[words.index("--seq") + 1] = "64"
    if "--cpu-offload-layers" in words:
        words[words.index("--cpu-offload-layers") + 1] = "1"
    return [*words, "--steps", str(num_steps(row, options))]


def num_steps(row: Row, options: argparse.Namespace) -> int:
    """Return how many steps a row is run for."""
    return row.steps if options.steps is None else options.steps


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
    if row.used_bytes is not None and peak(outcome, "used") > row.used_bytes:
        faults.append(f"more than {format_bytes(row.used_bytes)} used")
    if row.loads_below and peak(outcome, "used", "load") > peak(outcome, "used", "steady"):
        faults.append("more used while loading than in training")
    if outcome["tokens_per_second_per_device"] < row.tokens_per_second:
        faults.append(f"fewer than {row.tokens_per_second:,} tokens/s")
    if row.host_bytes is not None and peak(outcome, "host") > row.host_bytes:
        faults.append(f"more than {row.host_bytes / GB:.0f} GB of the host")
    return faults


def peak(outcome: dict[str, Any], name: str, only: str | None = None) -> int:
    """Return the peak over all phases, or in one of them."""
    return max(phase["peaks"][name] for phase in outcome["phases"] if only in (None, phase["name"]))


def summarize(
    name: str, row: Row, outcome: dict[str, Any], faults: list[str], options: argparse.Namespace
) -> tuple[str, ...]:
    """Return a line of the table."""
    verdict = f"NOT KEPT: {', '.join(faults)}" if faults else "kept" if row.fits else "refused, as it should be"
    if options.tiny and not faults:
        verdict = "ran, with a tiny model"
    if not outcome.get("phases"):
        return name, "", "", "", verdict
    used = format_bytes(peak(outcome, "used"))
    used += f" (at most {format_bytes(row.used_bytes)})" if row.used_bytes else ""
    rate = f"{outcome['tokens_per_second_per_device']:,.0f}" if "seconds_per_step" in outcome else "-"
    floor = f" (at least {row.tokens_per_second:,})" if row.tokens_per_second else ""
    return name, used, rate + floor, format_bytes(peak(outcome, "host")), verdict


def record(claim: Claim, name: str, outcome: dict[str, Any], options: argparse.Namespace) -> None:
    """Append the figures to the results."""
    if "versions" not in outcome:
        return  # nothing was measured
    figures: dict[str, tuple[float, str]] = {"fits": (float(outcome["fits"]), "1 or 0")}
    if outcome.get("phases"):
        for kind in ("used", "allocated"):
            figures[kind] = peak(outcome, kind) / GIB, "GiB"
            for phase in outcome["phases"]:
                figures[f"{kind}, {phase['name']}"] = phase["peaks"][kind] / GIB, "GiB"
        for kind in ("host", "anonymous", "file", "shared", "pinned"):
            figures[f"host memory, {kind}" if kind != "host" else kind] = peak(outcome, kind) / GIB, "GiB"
    if outcome["group_peak_bytes"] is not None:
        figures["control group"] = outcome["group_peak_bytes"] / GIB, "GiB"
    if "seconds_per_step" in outcome:  # it ended, within its cap or a little above
        figures["load"] = outcome["load_seconds"], "s"
        figures["step"] = outcome["seconds_per_step"], "s"
        figures["rate"] = outcome["tokens_per_second_per_device"], "tokens/s/GPU"
        figures["matmul share"] = 100 * outcome["matmul_share"], "%"
    steps = num_steps(claim.rows[name], options)
    words = [f"{key}={value}" for key, value in sorted(os.environ.items()) if _VARIABLES.match(key)]
    words += [f"python benchmarks/{Path(claim.file).name} --row", name, "--steps", str(steps)]
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
        for figure, (value, unit) in figures.items():
            today = datetime.date.today().isoformat()
            writer.writerow([today, f"{name}: {figure}", f"{value:.4g}", unit, command, hardware, versions])

"""Claim: a step takes half as long as TRL's own, or close to it, with no more memory and the same losses.

Each row compares runs that `throughput_ranks.py` does on this machine, in this call, on the same tokens: ours beside
stock TRL with FSDP2, bitsandbytes and PEFT, Llama shapes and random weights. A step is timed with the device drained
before and after; a run's figure is the median over its repetitions, each the median of ten steps after warm-up. One
group of processes does all runs of a kind, each on a fresh model, and groups run side by side where there are GPUs for
them: with four, ours on two beside stock's on two.

    python benchmarks/throughput.py --profile /tmp/profiles      # all rows, and profiles of ours

On four H200s all rows took eight minutes, the writing of stock's 15 GiB included. On two, where a call may take ten
minutes, four calls do them, with `--checkpoints` to write those once; the first was timed, the others are reckoned.

    W="--minutes 9.5 --checkpoints /tmp/stock"
    L="--row 8b-batch-8 --row 8b-batch-8-liger"
    python benchmarks/throughput.py $W $L --row 8b-batch-2 --row 8b-batch-8-auto                          # 6 minutes
    python benchmarks/throughput.py $W --row 8b-packed --row 100-steps --row 70b                          # 8 minutes
    python benchmarks/throughput.py $W --row sharding-overhead --row one-gpu                              # 5 minutes
    python benchmarks/throughput.py $W --row 8b-batch-2-whole --row 8b-batch-8-whole                      # 5 minutes

Rows that are not done in time are said to be not measured.

Figures are appended to `results.csv`; the table of what was promised and measured comes last. `--tiny` does all of it
on a CPU with a model of a few kilobytes, to see that the script works.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
COLUMNS = ("date", "claim", "value", "unit", "command", "hardware", "versions")
GIB = 2**30
STOP_SECONDS = 15
"""Kept back of `--minutes` for ending what takes too long, and for the table."""

LEARNING = ("ours-100", "ours-100-unfused", "ours-100-eager")

# What one group of processes does, one run after the other: on how many GPUs, and with which variables. The last one is
# held to its memory and uses the host's, so it has the machine for itself.
GROUPS: dict[str, tuple[int, dict[str, str], tuple[str, ...]]] = {
    "ours": (2, {}, ("ours-2-whole", "ours-2", "ours-8-whole", "ours-8", "ours-8-auto", "ours-packed", *LEARNING)),
    "stock": (2, {}, ("stock-2", "stock-8", "stock-packed", "stock-8-liger")),
    "ours on one": (1, {}, ("plain-8-one", "ours-8-one")),
    "stock on one": (1, {}, ("stock-8-one",)),
    "70b": (2, {"NCCL_BUFFSIZE": "1048576", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, ("ours-70b",)),
}
ALONE = {"70b"}
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One figure, and what it must be.

    Args:
        what (`str`): In a few words.
        unit (`str`): Of the figure.
        runs (`tuple[str, ...]`): What it is computed from.
        compute (`Callable`): Returns it, given the figures of these runs.
        at_least, at_most (`float`, *optional*): The promise.
    """

    what: str
    unit: str
    runs: tuple[str, ...]
    compute: Callable[..., float]
    at_least: float | None = None
    at_most: float | None = None

    def describe_promise(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}"
        return f"at most {self.at_most:g} {self.unit}" if self.at_most is not None else "reported"

    def is_kept(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


def step_seconds(figures: dict[str, Any]) -> float:
    """Return the median over the repetitions of the median step."""
    return statistics.median(statistics.median(times) for times in figures["seconds"])


def faster(ours: str, stock: str, at_least: float | None) -> Claim:
    """Claim to be so many times as fast."""
    what = f"{ours} beside {stock}"
    return Claim(what, "times", (ours, stock), lambda a, b: step_seconds(b) / step_seconds(a), at_least)


def no_larger(ours: str, stock: str) -> Claim:
    """Claim to need no more memory: the peaks of what tensors take."""
    what = f"memory, {ours} beside {stock}"
    return Claim(what, "times", (ours, stock), lambda a, b: ratio(a, b, "allocated_bytes"), at_most=1.0)


def ratio(first: dict[str, Any], second: dict[str, Any], name: str) -> float:
    """Return how many times as large a figure is; 1 where there is none, on a CPU."""
    return first[name] / second[name] if second[name] else 1.0


def matmul_share(figures: dict[str, Any]) -> float:
    """Return the percentage of the card's own rate of products that a run reaches."""
    done = figures["tokens_per_step"] * figures["flops_per_token"] / step_seconds(figures)
    return 100 * done / figures["matmul_flops_per_second"]


def loss_apart(figures: dict[str, Any]) -> float:
    """Return by how much, in percent, the loss of a pack differs from that of its sequences run alone."""
    return 100 * abs(figures["loss_packed"] / figures["loss_alone"] - 1)


def losses_apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return by how much, in percent, the losses of two runs ever differ."""
    return 100 * max(abs(a / b - 1) for a, b in zip(one["losses"], other["losses"], strict=True))


def apart_beside(fused: dict[str, Any], unfused: dict[str, Any], rounded: dict[str, Any]) -> float:
    """Return how many times as far the losses of fused layers are from those of unfused ones, on average, as are those
    of unfused layers that round elsewhere."""
    means = [
        statistics.fmean(abs(a / b - 1) for a, b in zip(run["losses"], unfused["losses"], strict=True))
        for run in (fused, rounded)
    ]
    return means[0] / means[1]


def loss_fallen(figures: dict[str, Any]) -> float:
    """Return by how much the loss has fallen, in percent: were it nothing, equal losses would show nothing."""
    return 100 * (1 - figures["losses"][-1] / figures["losses"][0])


# Half of the distance between bfloat16 numbers, relative to one: hidden states are rounded by as much.
BFLOAT16_PERCENT = 100 * 2**-9
ROWS: dict[str, tuple[Claim, ...]] = {
    "8b-batch-2": (faster("ours-2", "stock-2", 2.0), no_larger("ours-2", "stock-2")),
    "8b-batch-2-whole": (faster("ours-2-whole", "stock-2", 2.0), no_larger("ours-2-whole", "stock-2")),
    "8b-batch-8": (faster("ours-8", "stock-8", 1.6), no_larger("ours-8", "stock-8")),
    "8b-batch-8-whole": (faster("ours-8-whole", "stock-8", 1.6), no_larger("ours-8-whole", "stock-8")),
    "8b-batch-8-liger": (faster("ours-8", "stock-8-liger", 1.3), no_larger("ours-8", "stock-8-liger")),
    "8b-batch-8-auto": (
        faster("ours-8-auto", "stock-8", 2.0),
        Claim("used on a card", "GiB", ("ours-8-auto",), lambda a: a["used_bytes"] / GIB, at_most=72),
    ),
    "8b-packed": (
        faster("ours-packed", "stock-packed", 2.0),
        Claim("loss of a pack, off by", "%", ("ours-packed",), loss_apart, at_most=BFLOAT16_PERCENT),
    ),
    "70b": (
        Claim("of the card's products", "%", ("ours-70b",), matmul_share, at_least=65),
        Claim("used on a card", "GiB", ("ours-70b",), lambda a: a["used_bytes"] / GIB, at_most=23),
    ),
    "sharding-overhead": (
        Claim(
            "longer than whole",
            "%",
            ("ours-8", "plain-8-one"),
            lambda a, b: 100 * (step_seconds(a) / step_seconds(b) - 1),
            at_most=5,
        ),
    ),
    "100-steps": (
        Claim("losses, fused off unfused by", "%", LEARNING[:2], losses_apart),
        Claim("unfused, with other attention, by", "%", LEARNING[:0:-1], losses_apart),
        Claim("on average, fused beside that", "times", LEARNING, apart_beside, at_most=1.5),
        Claim("loss fallen by", "%", ("ours-100",), loss_fallen, at_least=5),
    ),
    "one-gpu": (faster("ours-8-one", "stock-8-one", None), no_larger("ours-8-one", "stock-8-one")),
}


def main() -> int:
    """Do the runs that the rows need, record them, and say what was kept."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended
    deadline = time.monotonic() + 60 * options.minutes - STOP_SECONDS
    rows = options.row or list(ROWS)
    needed = {name for row in rows for claim in ROWS[row] for name in claim.runs}
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        where = options.checkpoints or Path(folder)
        write_configs(where)
        jobs = [Job(group, needed, where, Path(folder), options) for group in GROUPS]
        do_all(jobs, find_gpus(max(job.num_ranks for job in jobs if job.waiting), options), deadline, figures)
    return 0 if print_table(rows, figures, options) else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", choices=ROWS, help="all of them, if not given")
    parser.add_argument("--minutes", type=float, default=15, help="end by then (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a repetition (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--profile", type=Path, help="folder for profiles of one more step of our timed runs")
    parser.add_argument("--checkpoints", type=Path, help="folder for stock's random weights, to find them again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args()


def write_configs(folder: Path) -> None:
    """Write the `config.json` of each shape, from which our runs draw their weights."""
    from train_llama import HEADS, SHAPES

    for shape, sizes in SHAPES.items():
        heads, kv_heads = HEADS[shape]
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        }
        (folder / shape).mkdir(parents=True, exist_ok=True)
        (folder / shape / "config.json").write_text(json.dumps(config | sizes))


# -- processes -------------------------------------------------------------------------------------------------------


class Job:
    """A group of processes that does runs, started again for the rest when one fails.

    Args:
        group (`str`): Of `GROUPS`.
        needed (`set[str]`): The runs that somebody wants.
        where (`Path`): Folder with the models.
        folder (`Path`): For what the processes write.
        options (`argparse.Namespace`): Of `parse_arguments`.
    """

    def __init__(self, group: str, needed: set[str], where: Path, folder: Path, options: argparse.Namespace) -> None:
        self.num_ranks, self.variables, runs = GROUPS[group]
        self.is_alone = group in ALONE
        self.runs = [name for name in runs if name in needed]
        self.waiting = list(self.runs)
        self.where, self.options = where, options
        self.out = folder / f"{group}.jsonl"
        self.process: subprocess.Popen | None = None
        self.gpus: list[str] = []

    def start(self, gpus: list[str]) -> None:
        """Start the processes for what is waiting, on these GPUs."""
        options, self.gpus = self.options, gpus
        variables = os.environ | self.variables | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "OMP_NUM_THREADS": "1"}
        if options.tiny:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable]
        if self.num_ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.num_ranks}"]
        command += [str(HERE / "throughput_ranks.py"), "--runs", ",".join(self.waiting), "--out", str(self.out)]
        command += ["--folder", str(self.where), "--seq", "64" if options.tiny else "2048"]
        for name in ("steps", "repetitions", "warm_up"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--profile", str(options.profile)] if options.profile else []
        command += ["--tiny"] if options.tiny else []
        print(f"== {', '.join(self.waiting)}", flush=True)
        self.process = subprocess.Popen(command, env=variables)

    def collect(self) -> Figures:
        """Return what was written, and strike it off what is waiting."""
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        done = {figures.pop("run"): figures for figures in map(json.loads, lines)}
        if self.waiting and not any(name in done for name in self.waiting):
            done[self.waiting[0]] = {"error": "ended without a result; the error above says why"}
        self.waiting = [name for name in self.waiting if name not in done]
        return done

    def stop(self) -> None:
        """End the processes: by asking, then by force."""
        if self.process is None or self.process.poll() is not None:
            return
        everybody = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.terminate()
        _, alive = psutil.wait_procs(everybody, timeout=STOP_SECONDS / 3)
        for survivor in alive:
            survivor.kill()
        self.process.wait()


def find_gpus(num_needed: int, options: argparse.Namespace) -> list[str]:
    """Return the GPUs, by the names that CUDA_VISIBLE_DEVICES gives them; with `--tiny`, two places for none."""
    if options.tiny:
        return ["0", "1"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) < num_needed:
        raise SystemExit(f"These rows need {num_needed} GPUs, and there are {len(gpus)}. --row one-gpu takes one.")
    return gpus


def do_all(jobs: list[Job], gpus: list[str], deadline: float, figures: Figures) -> None:
    """Do jobs, in their order and side by side as far as there are GPUs, until nothing is waiting or time is up."""
    free = list(gpus)
    running: list[Job] = []
    try:
        while any(job.waiting for job in jobs) and time.monotonic() < deadline:
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free = [gpu for gpu in gpus if gpu in {*free, *job.gpus}]
                note(job.collect(), figures, job.options)
            waiting = next((job for job in jobs if job.waiting and job not in running), None)
            if (
                waiting
                and len(free) >= waiting.num_ranks
                and not (running and (waiting.is_alone or running[0].is_alone))
            ):
                waiting.start(free[: waiting.num_ranks])
                free = free[waiting.num_ranks :]
                running.append(waiting)
            time.sleep(0.2)
    finally:
        for job in running:
            job.stop()
            note({name: value for name, value in job.collect().items() if "device" in value}, figures, job.options)


def note(new: Figures, figures: Figures, options: argparse.Namespace) -> None:
    """Keep what was measured, and record it."""
    figures |= new
    record_runs(new, options)


# -- results ---------------------------------------------------------------------------------------------------------


def record_runs(figures: Figures, options: argparse.Namespace) -> None:
    """Print and append what the runs measured."""
    for name, measured in figures.items():
        if "error" in measured:
            print(f"{name}: {measured['error']}", flush=True)
            continue
        seconds = step_seconds(measured)
        medians = [statistics.median(times) for times in measured["seconds"]]
        values = {
            "step": (seconds, "s"),
            "spread of the repetitions": (100 * (max(medians) / min(medians) - 1), "%"),
            "rate": (measured["tokens_per_step"] / seconds, "tokens/s/GPU"),
            "train peak allocated": (measured["allocated_bytes"] / GIB, "GiB"),
            "train used": (measured["used_bytes"] / GIB, "GiB"),
            "loss, first step": (measured["losses"][0], "nats"),
            "loss, last step": (measured["losses"][-1], "nats"),
        }
        kernels = "Liger" if measured["liger"] else "no Liger"
        print(
            f"{name}: {seconds:.4f} s a step ({kernels}, {measured['attention']}), {values['rate'][0]:,.0f} tokens/s, "
            f"{values['train peak allocated'][0]:.2f} GiB, ready after {measured['ready_seconds']:.0f} s",
            flush=True,
        )
        if measured["left_bytes"] > GIB // 4:
            print(f"  {measured['left_bytes'] / GIB:.2f} GiB of the run before were not freed, and are taken off")
        write_rows({f"throughput {name}: {what}": value for what, value in values.items()}, measured, options)


def write_rows(values: dict[str, tuple[float, str]], measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Append rows to the results."""
    words = ["python benchmarks/throughput.py"]
    words += [f"--row {name}" for name in options.row or []]
    words += [f"--steps {options.steps} --repetitions {options.repetitions}"] + ["--tiny"] * options.tiny
    hardware = f"{measured['spec']['num_ranks']}x {measured['device']}"
    versions = " ".join(f"{package}=={version}" for package, version in measured["versions"].items())
    today = datetime.date.today().isoformat()
    new = not options.results.exists()
    with options.results.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(COLUMNS)
        for claim, (value, unit) in values.items():
            writer.writerow([today, claim, f"{value:.4g}", unit, " ".join(words), hardware, versions])


def print_table(rows: list[str], figures: Figures, options: argparse.Namespace) -> bool:
    """Print what was promised and measured, and append it to the results. Returns whether every promise was kept."""
    head = ("row", "what", "promised", "measured", "")
    table, all_kept = [head], True
    for row in rows:
        for claim in ROWS[row]:
            absent = [name for name in claim.runs if "seconds" not in figures.get(name, {})]
            if absent:
                table.append((row, claim.what, claim.describe_promise(), "-", f"not measured: {', '.join(absent)}"))
                all_kept = False
                continue
            value = claim.compute(*(figures[name] for name in claim.runs))
            kept = claim.is_kept(value) or options.tiny
            verdict = "ran, with a tiny model" if options.tiny else "kept" if kept else "NOT KEPT"
            all_kept = all_kept and kept
            table.append((row, claim.what, claim.describe_promise(), f"{value:.3g} {claim.unit}", verdict))
            write_rows({f"throughput {row}: {claim.what}": (value, claim.unit)}, figures[claim.runs[0]], options)
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return all_kept


if __name__ == "__main__":
    sys.exit(main())

"""Prints the README's table of what was planned and what was measured, from `results.csv`.

    python benchmarks/planner_table.py

Planned is what the planner says now. Measured is the latest row of each run of `planner_truth.py`, and of those rows of
`offload.py` and `experts.py` that ran to the end on a host of its own size, the cap kept or not.

Processes of `planner_truth.py` run one configuration after the other, unless it is told `--fresh`, and do not give back
all of the host's memory: what a configuration found in them beyond what the first one had at its end is taken off what
was measured of it. So what a process weighs by itself is measured by the first configurations of each call and by
`offload.py`; of the others, how much they added.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experts
import offload
from planner_truth import CONFIGURATIONS, TRUTH_SHAPES
from transformers import AutoConfig

from hf_qlora_fsdp.planning.planner import MemoryEstimate, estimate_memory
from hf_qlora_fsdp.rehearsal import command as rehearsal

RESULTS = Path(__file__).parent / "results.csv"
GIB = 2**30
_TRUTH = re.compile(r"planner_truth\.py --only (?P<name>\S+)$")
_PROMISE = re.compile(
    r"(?P<script>offload|experts)\.py --row (?P<name>\S+) --steps \d+(?: --device-memory \S+)?(?: -- (?P<extra>.*))?$"
)
_SCRIPTS = {"offload": offload, "experts": experts}


@dataclass(frozen=True)
class Run:
    """One run that was measured.

    Args:
        shape (`str`): What it trained, by the name that its script gives it.
        config (`dict[str, Any]`): That model's config.
        words (`str`): Options of `rehearse`.
        ranks (`int`): Cards.
        figures (`dict[str, float]`): What `results.csv` has of it, in bytes.
    """

    shape: str
    config: dict[str, Any]
    words: str
    ranks: int
    figures: dict[str, float]

    def plan(self) -> MemoryEstimate:
        """Return what the planner says of it."""
        parser = argparse.ArgumentParser()
        rehearsal.add_arguments(parser)
        options = parser.parse_args([self.shape, *self.words.split()])
        targets = options.target_modules
        return estimate_memory(
            AutoConfig.for_model(**self.config),
            num_gpus=self.ranks,
            lora_r=options.lora_r,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            seq=options.seq,
            batch=options.batch,
            gradient_checkpointing=not options.no_gradient_checkpointing,
            activation_offloading=options.activation_offloading,
            cpu_offload=options.cpu_offload or options.cpu_offload_layers is not None,
            cpu_offload_layers=options.cpu_offload_layers,
            cpu_offload_pin_memory=not options.no_pin,
            use_liger_kernel=options.use_liger_kernel,
            fuse_lora=not options.no_fuse_lora,
        )


@dataclass(frozen=True)
class Comparison:
    """One run, in bytes.

    Args:
        run (`Run`): Which.
        planned (`float`), measured (`float`): What torch allocated on the fullest card in steady steps.
        planned_host (`float`), measured_host (`float`): What all ranks had of the host.
        left (`float`): What configurations before had left there, not counted in it.
    """

    run: Run
    planned: float
    measured: float
    planned_host: float
    measured_host: float
    left: float

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1

    @property
    def host_error(self) -> float:
        return self.planned_host / self.measured_host - 1


def compare(results: Path = RESULTS) -> list[Comparison]:
    """Plan what was measured."""
    found, runs = [], list(read_runs(results))
    for run in runs:
        estimate, figures = run.plan(), run.figures
        card, host = estimate.card["steady"].total, estimate.host["steady"]
        # What configurations before this one have left in the processes is not its own.
        series = [other.figures for other in runs if other.ranks == run.ranks and "host, before" in other.figures]
        first = min(series, key=lambda figures: figures["host, before"], default={})
        left = max(0.0, figures.get("host, before", 0.0) - first.get("host, steady", 0.0))
        measured_host = figures.get("host, steady", figures.get("host", 0.0)) - left
        found.append(Comparison(run, card, figures["allocated, steady"], host.total(), measured_host, left))
    return found


def read_runs(results: Path) -> Iterator[Run]:
    """Read the runs on cards whose steady steps were measured."""
    measured: dict[tuple[str, ...], dict[str, float]] = {}
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            found = _TRUTH.search(row["command"]) or _PROMISE.search(row["command"])
            if "CPU" not in row["hardware"] and found:
                key = (found[0], *(row[name] for name in ("hardware", "date", "versions")))
                figures = measured.setdefault(key, {})
                figures[row["claim"].partition(": ")[2]] = float(row["value"]) * GIB
    latest = {
        (command, hardware.partition("x ")[0]): figures
        for (command, hardware, *_), figures in measured.items()
        if "allocated, steady" in figures  # else it ended before, or nobody asked by phase then
    }
    for (command, ranks), figures in latest.items():
        if found := _TRUTH.search(command):
            configuration = CONFIGURATIONS[found["name"]]
            shape, words, config = configuration.shape, configuration.words, TRUTH_SHAPES[configuration.shape]
        elif found := _PROMISE.search(command):
            script = _SCRIPTS[found["script"]]
            row = script.ROWS[found["name"]]
            if row.host_limit or row.script:
                continue
            shape, words, config = row.shape, " ".join((*row.words, found["extra"] or "")), script.SHAPES[row.shape]
        yield Run(shape, config, words.strip(), int(ranks), figures)


def format_table(comparisons: list[Comparison]) -> str:
    """Format as a Markdown table."""
    lines = ["| run | a card, planned | measured | | the host, planned | measured | |", "|---|---|---|---|---|---|---|"]
    for one in comparisons:
        what = f"{one.run.shape} on {one.run.ranks}: `{one.run.words}`"
        card = f"{one.planned / GIB:.2f} GiB | {one.measured / GIB:.2f} GiB | {one.error:+.1%}"
        host = f"{one.planned_host / GIB:.1f} GiB | {one.measured_host / GIB:.1f} GiB | {one.host_error:+.1%}"
        lines.append(f"| {what} | {card} | {host} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table(compare()))

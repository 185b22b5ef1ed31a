"""Prints the README's table of what was planned and what was measured, from `results.csv`.

    python benchmarks/planner_table.py

Planned is what the planner says now. Measured is the latest row of each run of `planner_truth.py`, and of those rows of
`offload.py` and `experts.py` that ran to the end on a host of its own size, the cap kept or not.

Processes of `planner_truth.py` run one configuration after the other, unless it is told `--fresh`, and do not give back
all of the host's memory: up to 0.6 GiB of what was measured there is of the configurations before.
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
_TRUTH = re.compile(r"(planner_truth)\.py --only (\S+)()$")
_PROMISE = re.compile(r"(offload|experts)\.py --row (\S+) --steps \d+(?: --device-memory \S+)?(?: -- (.*))?$")
"""Which script, which of its rows, and what of `rehearse` beside: how many steps there were makes no other run."""
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
    """

    run: Run
    planned: float
    measured: float
    planned_host: float
    measured_host: float

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1

    @property
    def host_error(self) -> float:
        return self.planned_host / self.measured_host - 1


def compare(results: Path = RESULTS) -> list[Comparison]:
    """Plan what was measured."""
    found = []
    for run in read_runs(results):
        estimate, figures = run.plan(), run.figures
        card, host = estimate.card["steady"].total, estimate.host["steady"].total()
        measured_host = figures.get("host, steady", figures.get("host", 0.0))
        found.append(Comparison(run, card, figures["allocated, steady"], host, measured_host))
    return found


def read_runs(results: Path) -> Iterator[Run]:
    """Read the runs on cards whose steady steps were measured."""
    measured: list[tuple[tuple[Any, ...], dict[str, float]]] = []
    last: dict[tuple[Any, ...], dict[str, float]] = {}
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            found = _TRUTH.search(row["command"]) or _PROMISE.search(row["command"])
            if "CPU" not in row["hardware"] and found:
                key = (found.groups(), *(row[name] for name in ("hardware", "date", "versions")))
                name = row["claim"].partition(": ")[2]
                if name in last.get(key, {name: 0.0}):  # what is said again is said of another run
                    last[key] = {}
                    measured.append((key, last[key]))
                last[key][name] = float(row["value"]) * GIB
    latest = {
        (run, hardware.partition("x ")[0]): figures
        for (run, hardware, *_), figures in measured
        if "allocated, steady" in figures  # else it ended before, or nobody asked by phase then
    }
    for ((script, name, extra), ranks), figures in latest.items():
        if script == "planner_truth":
            configuration = CONFIGURATIONS[name]
            shape, words, config = configuration.shape, configuration.words, TRUTH_SHAPES[configuration.shape]
        else:
            row = _SCRIPTS[script].ROWS[name]
            if row.host_limit or row.script:
                continue
            shape, words, config = row.shape, " ".join((*row.words, extra or "")), _SCRIPTS[script].SHAPES[row.shape]
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

"""Prints the README's table of what was planned and what was measured, from `results.csv`.

    python benchmarks/planner_table.py

Planned is what the planner says now, measured what `planner_truth.py` saw: the latest row of each of its runs.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from planner_truth import CONFIGURATIONS, TRUTH_SHAPES, Configuration
from transformers import AutoConfig

from hf_qlora_fsdp.planning.planner import estimate_memory

RESULTS = Path(__file__).parent / "results.csv"
GIB = 2**30


@dataclass(frozen=True)
class Comparison:
    """One run, in bytes.

    Args:
        name (`str`): Of `CONFIGURATIONS`.
        planned (`float`), measured (`float`): What torch allocated on the fullest card in steady steps.
        planned_host (`float`), measured_host (`float`): What all ranks had of the host.
    """

    name: str
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
    measured: dict[str, dict[str, float]] = {}
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            name, _, figure = row["claim"].removeprefix("planner ").partition(": ")
            if row["claim"].startswith("planner "):
                measured.setdefault(name, {})[figure] = float(row["value"]) * GIB
    found = []
    for name, figures in measured.items():
        estimate = plan_configuration(CONFIGURATIONS[name])
        card, host = estimate.card["steady"].total, estimate.host["steady"].total()
        # What configurations before this one have left in the processes is not its own.
        left = max(0.0, figures["host, before"] - estimate.host["steady"]["processes"])
        found.append(Comparison(name, card, figures["allocated, steady"], host, figures["host, steady"] - left))
    return found


def plan_configuration(configuration: Configuration):
    """Return the planner's estimate of a run."""
    options = configuration.options
    targets = options.target_modules
    return estimate_memory(
        AutoConfig.for_model(**TRUTH_SHAPES[configuration.shape]),
        num_gpus=configuration.ranks,
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


def format_table(comparisons: list[Comparison]) -> str:
    """Format as a Markdown table."""
    lines = ["| run | a card, planned | measured | | the host, planned | measured | |", "|---|---|---|---|---|---|---|"]
    for one in comparisons:
        configuration = CONFIGURATIONS[one.name]
        what = f"{configuration.shape} on {configuration.ranks}: `{configuration.words}`"
        card = f"{one.planned / GIB:.2f} GiB | {one.measured / GIB:.2f} GiB | {one.error:+.1%}"
        host = f"{one.planned_host / GIB:.1f} GiB | {one.measured_host / GIB:.1f} GiB | {one.host_error:+.1%}"
        lines.append(f"| {what} | {card} | {host} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table(compare()))

"""Prints the README's tables of results from `results.csv`: one row a run, the latest of each command.

python benchmarks/table.py            runs of train_llama.py
python benchmarks/table.py promises   runs that were held to a promise: offload.py and experts.py
python benchmarks/table.py throughput   what throughput.py compares, and what is promised of it
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from throughput import ROWS

RESULTS = Path(__file__).parent / "results.csv"
RUNS = {
    "load": "load s",
    "load peak allocated": "load peak GiB",
    "rate": "tokens/s/GPU",
    "train peak allocated": "train peak GiB",
    "train used": "used GiB",
    "host memory of rank 0": "host GiB",
}
"""Figures of `train_llama.py`, and what they are called in the table."""
PROMISES = {
    "fits": "kept to its memory",
    "used": "used GiB a card",
    "allocated": "in tensors",
    "rate": "tokens/s/GPU",
    "matmul share": "of the card's matmul rate, %",
    "host": "host GiB, all ranks",
}
"""Figures of rows of `promises.py`. What was refused before it trained has no row."""
TABLES = {
    "": (RUNS, re.compile(r"train_llama\.py (.*)")),
    "promises": (PROMISES, re.compile(r"(?:offload|experts)\.py --row (\S+) --steps \d+(.*)")),
}


_TIMED: Any = re.compile(r"--steps (\d+) --repetitions (\d+)")


def read_runs(script: re.Pattern[str], results: Path = RESULTS) -> dict[tuple[str, str], dict[str, str]]:
    """Return the figures of each run whose command matches, by hardware and what the pattern's groups say of it."""
    runs: dict[tuple[str, str], dict[str, str]] = {}
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if found := script.search(row["command"]):
                name, run = row["claim"].rpartition(": ")[2], (row["hardware"], "".join(found.groups()))
                if name == "fits":  # the first figure of a run that was held to a promise
                    runs[run] = {}
                runs.setdefault(run, {})[name] = row["value"]
    return runs


def format_table(which: str) -> str:
    """Format one of the tables in Markdown. A figure that a run has not got is left out of its row."""
    if which == "throughput":
        return format_claims()
    columns, script = TABLES[which]
    lines = [f"| run | hardware | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    for (hardware, arguments), figures in read_runs(script).items():
        if "used, load" not in figures or "used, steady" in figures:
            values = " | ".join(_format(name, figures.get(name)) for name in columns)
            lines.append(f"| `{arguments}` | {hardware} | {values} |")
    return "\n".join(lines)


def format_claims(results: Path = RESULTS) -> str:
    """Format what `throughput.py` claims, beside the latest that was measured on GPUs."""
    with results.open(newline="") as stream:
        measured = {row["claim"]: row for row in csv.DictReader(stream) if "CPU" not in row["hardware"]}
    lines = ["| row | what | promised | measured | steps | hardware |", "|---|---|---|---|---|---|"]
    for name, claims in ROWS.items():
        for claim in claims:
            row = measured.get(f"throughput {name}: {claim.what}")
            if row is None:
                lines.append(f"| {name} | {claim.what} | {claim.describe_promise()} | not yet | | |")
                continue
            value = float(row["value"])
            said = f"{value:.3g} {claim.unit}" + ("" if claim.is_kept(value) else ", not kept")
            steps, repetitions = _TIMED.search(row["command"]).groups()
            timed = f"{repetitions} x {steps}"
            lines.append(
                f"| {name} | {claim.what} | {claim.describe_promise()} | {said} | {timed} | {row['hardware']} |"
            )
    return "\n".join(lines)


def _format(name: str, value: str | None) -> str:
    if value is None:
        return ""
    if name == "fits":
        return ("no", "yes")[int(value)]
    return f"{float(value):,.0f}" if float(value) >= 1000 else f"{float(value):.4g}"


if __name__ == "__main__":
    print(format_table(" ".join(sys.argv[1:])))

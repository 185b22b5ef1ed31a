"""Prints the README's table of results from `results.csv`: one row a run, the latest of each command.

python benchmarks/table.py
"""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = {
    "load": "load s",
    "load peak allocated": "load peak GiB",
    "rate": "tokens/s/GPU",
    "train peak allocated": "train peak GiB",
    "train used": "used GiB",
    "host memory of rank 0": "host GiB",
}


def read_runs(results: Path = RESULTS) -> dict[tuple[str, str], dict[str, str]]:
    """Return the figures of each run, by hardware and arguments."""
    runs: dict[tuple[str, str], dict[str, str]] = {}
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            _, script, arguments = row["command"].partition("train_llama.py ")
            if not script:  # offloading/offload.py prints a table of its own
                continue
            name = row["claim"].rpartition(": ")[2]
            runs.setdefault((row["hardware"], arguments), {})[name] = row["value"]
    return runs


def format_table(runs: dict[tuple[str, str], dict[str, str]]) -> str:
    """Format runs as a Markdown table."""
    lines = [f"| run | hardware | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for (hardware, arguments), figures in runs.items():
        values = " | ".join(f"{float(figures[name]):,.4g}" for name in COLUMNS)
        lines.append(f"| `{arguments}` | {hardware} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table(read_runs()))

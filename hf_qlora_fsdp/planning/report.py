"""A plan for people and for programs: a table, JSON, a picture."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from ..units import format_bytes, format_count, format_table
from .cards import HOLES
from .memory_estimate import PHASES
from .memory_model import CAUSES
from .planner import Plan

_MOST_REJECTED = 12


def check_outputs(files: Mapping[str, str | None]) -> None:
    """Refuse, before the work, what could not be written after it.

    Args:
        files (`Mapping[str, str]`): File of each option, such as `{"--plot": "plan.png"}`.
    Raises:
        ValueError: A folder is missing, or matplotlib is.
    """
    for option, file in files.items():
        if file not in (None, "-") and not Path(str(file)).absolute().parent.is_dir():
            raise ValueError(f"{option} {file}: there is no folder for it. Make the folder, or name another file.")
    if files.get("--plot") is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--plot {files['--plot']} needs matplotlib, which is not installed. pip install matplotlib, or leave it "
            "out: --json has the same figures."
        )


def present(plan: Plan, json_file: str | None = None, plot_file: str | None = None) -> int:
    """Print, write and draw a plan.

    Args:
        plan (`Plan`): The plan.
        json_file (`str`, *optional*): Where all figures go; `"-"` for stdout, and the table goes to stderr.
        plot_file (`str`, *optional*): Where the picture goes.
    Returns:
        `int`: Exit code: 0 if it fits, 1 if not.
    """
    print(describe(plan), file=sys.stderr if json_file == "-" else sys.stdout, flush=True)
    if json_file == "-":
        print(json.dumps(plan.to_dict()))
    elif json_file is not None:
        Path(json_file).write_text(json.dumps(plan.to_dict()) + "\n")
    if plot_file is not None:
        from .plot import draw_bars

        draw_bars(plan, plot_file)
    return 0 if plan.fits else 1


def describe(plan: Plan) -> str:
    """Format a plan."""
    return "\n".join(
        [
            _describe_run(plan),
            _describe_card(plan),
            _describe_host(plan),
            _describe_time(plan),
            *_verdict(plan),
            *_describe_rejected(plan),
            "taken for granted",
            *(f"  {assumption}" for assumption in plan.assumptions),
        ]
    )


def _describe_run(plan: Plan) -> str:
    settings, machine = plan.chosen.settings, plan.machine
    targets = plan.target_modules if isinstance(plan.target_modules, str) else ", ".join(plan.target_modules)
    per_step = settings.num_ranks * settings.batch * settings.gradient_accumulation_steps
    host = "" if machine.host_bytes is None else f"; {format_bytes(machine.host_bytes)} of host memory"
    if machine.swap_bytes:
        host += f", {format_bytes(machine.swap_bytes)} of swap"
    rows = [
        ("model", f"{plan.model}, {format_count(plan.weight.num_packed)} parameters in 4 bits"),
        ("cards", f"{machine.num_gpus} of {format_bytes(machine.device_bytes)}, as fast as {machine.card.name}{host}"),
        ("a step", f"{per_step} sequences of {settings.seq} tokens; LoRA r={plan.lora_r} on {targets}"),
        ("settings", settings.describe(len(plan.weight.layers))),
    ]
    return format_table(rows, title="plan")


def _describe_card(plan: Plan) -> str:
    estimate = plan.chosen.estimate
    moments = [estimate.card[phase] for phase in PHASES]
    sizes = [moment.sizes for moment in moments]
    cells = [["a card, when it is fullest", *PHASES], ["", *(moment.name for moment in moments)]]
    for cause in CAUSES:
        if any(size[cause] for size in sizes):
            cells.append([f"  {cause}", *(format_bytes(size[cause]) if size[cause] else "-" for size in sizes)])
    cells.append(["  tensors", *(format_bytes(moment.total) for moment in moments)])
    cells.append([f"  holes between them ({HOLES:.0%})", *(format_bytes(HOLES * moment.total) for moment in moments)])
    cells.append(["  CUDA, kernels, NCCL", *[format_bytes(estimate.outside)] * len(PHASES)])
    totals = [moment.total * (1 + HOLES) + estimate.outside for moment in moments]
    cells.append(["  in all", *map(format_bytes, totals)])
    return _format_cells(cells)


def _describe_host(plan: Plan) -> str:
    estimate = plan.chosen.estimate
    cells = [[f"a host, {plan.chosen.settings.ranks_per_host} ranks", *PHASES]]
    causes = list(dict.fromkeys(cause for sizes in estimate.host.values() for cause in sizes))
    for cause in causes:
        sizes = [estimate.host[phase][cause] for phase in PHASES]
        cells.append([f"  {cause}", *(format_bytes(size) if size else "-" for size in sizes)])
    cells.append(["  in all", *(format_bytes(estimate.host[phase].total()) for phase in PHASES)])
    disk = [(f"  {what}", format_bytes(size)) for what, size in estimate.disk.items()]
    return "\n".join([_format_cells(cells), format_table([(row[0].strip(), row[1]) for row in disk], title="its disk")])


def _describe_time(plan: Plan) -> str:
    time, name = plan.chosen.time, plan.machine.card.name
    parts = {
        "computing": time.compute,
        "dequantising": time.dequantise,
        "gathering": time.gather,
        "link to the host": time.host,
        "Python and launches": time.launches,
    }
    rows = [(what, f"{seconds:.2f} s") for what, seconds in parts.items() if seconds]
    rate = f"{time.tokens_per_second:,.0f} tokens/s on all cards"
    rows.append(("a step, at best", f"{time.seconds:.2f} s, {rate}; it waits for {time.bound}"))
    return format_table(rows, title=f"time, as {name} and its links allow")


def _verdict(plan: Plan) -> list[str]:
    estimate, machine = plan.chosen.estimate, plan.machine
    if plan.fits:
        need, have = format_bytes(estimate.card_bytes), format_bytes(machine.device_bytes)
        return [f"It fits: {need} of {have} on a card, and {format_bytes(plan.margin_bytes)} are left."]
    lines = [f"It does not fit. What lacks least is shown: {'; '.join(plan.chosen.obstacles)}."]
    if plan.changes:
        lines.append("It would with (any of these, the least first):")
        lines += [f"  {change.text}" for change in plan.changes]
    else:
        lines.append("No more of one thing alone would do; a smaller model would.")
    return lines


def _describe_rejected(plan: Plan) -> list[str]:
    if not plan.rejected:
        return []
    # What fits, the fastest first, then what does not.
    order = sorted(plan.rejected, key=lambda one: (bool(one.obstacles), -one.time.tokens_per_second))
    count = len(plan.weight.layers)
    cells = [["tried, and not chosen", "card", "host", "tokens/s", ""]]
    for one in order[:_MOST_REJECTED]:
        sizes = format_bytes(one.estimate.card_bytes), format_bytes(one.estimate.host_bytes)
        name = f"  {one.settings.describe(count)}"
        cells.append([name, *sizes, f"{one.time.tokens_per_second:,.0f}", one.reason])
    lines = [_format_cells(cells, last_left=True)]
    if len(order) > _MOST_REJECTED:
        lines.append(f"  and {len(order) - _MOST_REJECTED} more, see --json")
    return lines


def _format_cells(cells: list[list[str]], last_left: bool = False) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        middle = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        if last_left:
            middle[-1] = row[-1]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle]).rstrip())
    return "\n".join(lines)

"""A rehearsal for people and for programs: a table, a JSON file, and memory over time as a picture."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..units import format_bytes, format_count, format_seconds, format_table

_ON_CARD = {"allocated": "tensors", "reserved": "held by torch", "used": "used, by the driver"}
_ON_HOST = {"host": "all of it", "anonymous": "anonymous", "file": "mapped files", "shared": "shared"}


def check_outputs(json_file: str | None, plot_file: str | None) -> None:
    """Refuse, before the work, what could not be written after it.

    Raises:
        ValueError: A folder is missing or closed, the file is a folder, or matplotlib is missing.
    """
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file is None or (file == "-" and option == "--json"):
            continue
        path = Path(file).absolute()
        if not path.parent.is_dir():
            raise ValueError(f"{option} {file}: there is no folder for it. Make the folder, or name another file.")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{option} {file}: no file can be written there. Name another.")
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--plot {plot_file} needs matplotlib, which is not installed. pip install matplotlib, or leave it out: "
            "--json has the same figures."
        )


def present(outcome: dict[str, Any], json_file: str | None, plot_file: str | None) -> int:
    """Print, write and draw an outcome.

    Args:
        outcome (`dict`): Of `command.take_part`, or of `command.collect`.
        json_file (`str`, *optional*): Where all figures go; `"-"` for stdout, and the table goes to stderr.
        plot_file (`str`, *optional*): Where the picture goes.
    Returns:
        `int`: Exit code: 0 if it fits, 1 if not.
    """
    print(describe(outcome), file=sys.stderr if json_file == "-" else sys.stdout, flush=True)
    if json_file == "-":
        print(json.dumps(outcome))
    elif json_file is not None:
        Path(json_file).write_text(json.dumps(outcome) + "\n")
    if plot_file is not None:
        if outcome.get("phases"):
            draw(outcome, plot_file)
        else:
            print(f"{plot_file} is not drawn: nothing was measured.", file=sys.stderr)
    return 0 if outcome["fits"] else 1


def describe(outcome: dict[str, Any]) -> str:
    """Format an outcome: what was rehearsed, memory by phase, speed, and whether it fits."""
    parts = []
    if "model" in outcome:
        parts.append(_describe_run(outcome))
    if outcome.get("phases"):
        parts.append(_describe_memory(outcome))
    if "seconds_per_step" in outcome:
        parts.append(_describe_speed(outcome))
    return "\n".join([*parts, *_verdict(outcome)])


def _describe_run(outcome: dict[str, Any]) -> str:
    options = outcome["options"]
    trained = f"LoRA r={options['lora_r']} on {', '.join(options['target_modules'])}"
    counts = outcome.get("parameters")
    sizes = f", {format_count(counts['4bit'])} parameters in 4 bits" if counts else ""
    flags = (
        "expert_chunk",
        "no_fuse_lora",
        "use_liger_kernel",
        "cpu_offload",
        "no_pin",
        "cpu_offload_layers",
        "cpu_offload_dir",
        "replicate_layers",
        "activation_offloading",
    )
    chosen = [name for name in (*flags, "no_gradient_checkpointing") if options.get(name) not in (None, False)]
    shown = [f"{name}={options[name]}" if options[name] is not True else name for name in chosen]
    per_step = outcome["world_size"] * options["batch"] * options["grad_accumulation"]
    rows = [
        ("model", f"{outcome['model']}{sizes}"),
        ("ranks", f"{outcome['world_size']} on {outcome['device']}"),
        (
            "a step",
            f"{per_step} sequences of {options['seq']} tokens, {options['batch']} at a time on a rank; {trained}",
        ),
        ("options", ", ".join(shown) or "none"),
    ]
    if outcome["limit_bytes"]:
        outside = " to ".join(format_bytes(size) for size in outcome["outside_allocator_bytes"])
        rows.append(("a card", f"{format_bytes(outcome['limit_bytes'])}, of which CUDA and NCCL took {outside}"))
    return format_table(rows, title="rehearsal")


def _describe_memory(outcome: dict[str, Any]) -> str:
    phases = outcome["phases"]
    cells = [["", *(phase["name"] for phase in phases)]]
    groups = [(f"the host, {outcome['world_size']} ranks", _ON_HOST)]
    if outcome["device"] != "CPU":
        groups = [("the fullest card", _ON_CARD), (groups[0][0], _ON_HOST | {"pinned": "pinned, of these"})]
    for title, names in groups:
        cells.append([title, *[""] * len(phases)])
        for name, label in names.items():
            cells.append([f"  {label}", *(format_bytes(phase["peaks"][name]) for phase in phases)])
    cells.append(["time", *(format_seconds(phase["seconds"]) for phase in phases)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(phases) + 1)]
    lines = [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join(["most memory in each phase", *(line.rstrip() for line in lines)])


def _describe_speed(outcome: dict[str, Any]) -> str:
    rate, share = outcome["matmul_flops_per_second"] / 1e12, outcome["matmul_share"]
    losses = outcome["losses"]
    rows = [
        ("a step", f"{outcome['seconds_per_step']:.3g} s (median of the last {outcome['num_timed_steps']})"),
        ("rate", f"{outcome['tokens_per_second_per_device']:,.0f} tokens/s on each device"),
        ("matmuls", f"{share:.1%} of the {rate:,.3g} TFLOP/s that large ones reach here"),
        ("loss", f"{losses[0]:.3f} to {losses[-1]:.3f}, on random weights and tokens"),
    ]
    if outcome["allocator_retries"]:
        often = f"{outcome['allocator_retries']} times after the first step"
        rows.append(("memory", f"so full that torch had to wait, clear its cache and ask again, {often}"))
    return format_table(rows, title="speed")


def _verdict(outcome: dict[str, Any]) -> list[str]:
    if outcome["fits"]:
        used = max(phase["peaks"]["used"] for phase in outcome["phases"])
        size = outcome["limit_bytes"] or outcome["device_bytes"]
        room = f": {format_bytes(used)} of {format_bytes(size)} were in use on a card" if size else ""
        return [f"It fits{room}."]
    if "failure" not in outcome:
        return [
            f"It does not fit: more was in use on a card than --device-memory, by "
            f"{format_bytes(outcome['over_limit_bytes'])}. CUDA and NCCL had grown."
        ]
    failure = outcome["failure"]
    if "place" not in failure:
        return [f"It cannot run ({failure['phase']}): {failure['said']}"]
    lines = [
        f"It does not fit. Rank {failure['rank']} ran out of memory on the {failure['place']}: {failure['phase']}."
    ]
    if failure["reason"] in ("killed", "refused"):
        lines = [f"It does not fit ({failure['phase']}): {failure['said']}"]
    if failure["asked_bytes"] is not None:
        lines.append(f"It asked for {format_bytes(failure['asked_bytes'])}.")
    if failure["missing_bytes"] is not None:
        about = "In all," if failure["phase"] == "load" else "At least"
        lines[-1] += f" {about} {format_bytes(failure['missing_bytes'])} were missing."
    if failure["advice"]:
        lines += ["What would help:", *(f"  {item}" for item in failure["advice"])]
    return lines


def draw(outcome: dict[str, Any], file: str) -> None:
    """Draw memory over time, device above host, with the phases marked, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from .plot import draw_timeline

    draw_timeline(outcome, file)

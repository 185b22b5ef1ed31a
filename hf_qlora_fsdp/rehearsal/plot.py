"""Memory over time as a picture: the fullest card above, all ranks' host memory below, phases across both.

What is stacked adds up: tensors, what torch holds beside them, and what only the driver sees. So the upper edge is what
is in use on the card, and its distance to the dashed line is the room that is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..pictures import BEHIND_TEXT, FAINT, INK, choose_unit, list_layers, mark_limit, picture
from ..units import format_bytes, format_seconds

_CARD = {"tensors": "#2a6f97", "held by torch": "#89c2d9", "CUDA, NCCL, kernels": "#cfd8dc"}
_HOST = {"anonymous": "#bc6c25", "shared": "#dda15e", "mapped files": "#ede0d4"}
_BANDS = {"load": "#f4f1ea", "first step": "#e8eef2", "steady": "#f3f7ee"}


def draw_timeline(outcome: dict[str, Any], file: str) -> None:
    """Draw an outcome of a rehearsal.

    Args:
        outcome (`dict`): With `phases` and `trace`.
        file (`str`): PNG to write.
    """
    traces = [np.array(rows, dtype=float) for rows in outcome["trace"]["ranks"].values()]
    start = min(trace[0, 0] for trace in traces)
    for trace in traces:
        trace[:, 0] -= start
    on_card = outcome["device"] != "CPU"
    height = 6.4 if on_card else 4.0
    with picture(file, _title(outcome), (10, height), nrows=1 + on_card, sharex=True) as (figure, axes):
        if on_card:
            fullest = max(traces, key=lambda trace: trace[:, 3].max())
            seconds, allocated, reserved, used = fullest[:, :4].T
            layers = [allocated, np.maximum(reserved - allocated, 0), np.maximum(used - reserved, 0)]
            _stack(axes[0], seconds, dict(zip(_CARD, layers, strict=True)), _CARD, "the fullest card")
            mark_limit(axes[0], outcome["limit_bytes"] or outcome["device_bytes"], used.max())
        # One clock for all ranks: each is read at the moments of the first.
        seconds = traces[0][:, 0]
        sums = [sum(np.interp(seconds, trace[:, 0], trace[:, column]) for trace in traces) for column in (4, 6, 5)]
        host = dict(zip(_HOST, sums, strict=True))
        _stack(axes[-1], seconds, host, _HOST, f"the host, {len(traces)} rank{'s' * (len(traces) > 1)}")
        for axis in axes:
            _mark_phases(axis, outcome["phases"], start, named=axis is axes[0])
        axes[-1].set_xlabel("seconds")
        axes[-1].set_xlim(0, max(trace[-1, 0] for trace in traces))
        figure.text(0.01, 0.985 - 0.36 / height, _subtitle(outcome), ha="left", va="top", color=FAINT)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / height))


def _stack(axis: Axes, seconds: Any, layers: dict[str, Any], colors: dict[str, str], title: str) -> None:
    """Fill layers on top of each other, and name the highest point."""
    top = sum(layers.values())
    unit, name = choose_unit(top.max())
    scaled = [layer / unit for layer in layers.values()]
    axis.stackplot(seconds, *scaled, colors=[colors[key] for key in layers], labels=list(layers), linewidth=0)
    axis.plot(seconds, top / unit, color=INK, linewidth=0.8)
    peak = int(top.argmax())
    axis.plot(seconds[peak], top[peak] / unit, "o", color=INK, markersize=4)
    right_half = seconds[peak] > seconds[-1] / 2
    axis.annotate(
        format_bytes(top[peak]),
        (seconds[peak], top[peak] / unit),
        xytext=(-7 if right_half else 7, -14),
        textcoords="offset points",
        ha="right" if right_half else "left",
        fontweight="bold",
        bbox=BEHIND_TEXT,
    )
    axis.set_ylabel(f"{title}, {name}")
    axis.set_ylim(0, top.max() / unit * 1.22)
    axis.yaxis.grid(True, color="white", linewidth=1)
    list_layers(axis)


def _mark_phases(axis: Axes, phases: list[dict[str, Any]], start: float, named: bool) -> None:
    for phase in phases:
        began = phase["began"] - start
        axis.axvspan(began, began + phase["seconds"], color=_BANDS[phase["name"]], zorder=-2, linewidth=0)
        axis.axvline(began, color=FAINT, linewidth=0.7, linestyle=":")
        if named:
            axis.annotate(
                f"{phase['name']}\n{format_seconds(phase['seconds'])}",
                (began, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, 3),
                textcoords="offset points",
                va="bottom",
                fontsize=8,
                color=FAINT,
            )


def _title(outcome: dict[str, Any]) -> str:
    options = outcome["options"]
    size = f"{options['seq']} tokens x {options['batch']}"
    return f"{outcome['model']}: {outcome['world_size']} x {outcome['device']}, {size}"


def _subtitle(outcome: dict[str, Any]) -> str:
    if "failure" in outcome:
        return f"Out of memory in phase {outcome['failure']['phase']!r}."
    rate, share = outcome["tokens_per_second_per_device"], outcome["matmul_share"]
    return f"{rate:,.0f} tokens/s on each device, {share:.0%} of the rate of large matrix products"

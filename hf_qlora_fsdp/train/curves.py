"""The curves of a run as a picture: loss above, memory below, over the same steps."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..pictures import GRID, choose_unit, picture
from ..units import format_bytes
from .progress import Sample

_LOSS, _HELD_OUT, _CARD, _HOST = "#2a6f97", "#c1121f", "#2a6f97", "#bc6c25"


def draw_curves(history: list[dict[str, Any]], samples: list[Sample], title: str, file: str) -> None:
    """Draw a run.

    Args:
        history (`list[dict]`): What the trainer logged (`state.log_history`): `loss` and `eval_loss` by `step`.
        samples (`list[Sample]`): Memory of rank 0 after each step.
        title (`str`): Above the picture.
        file (`str`): PNG to write.
    """
    with picture(file, title, (8, 6), nrows=2, sharex=True, height_ratios=(3, 2)) as (figure, (loss, memory)):
        for name, label, color in (("loss", "training", _LOSS), ("eval_loss", "held out", _HELD_OUT)):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                loss.plot(*zip(*points, strict=True), color=color, marker="." * (len(points) < 50), label=label)
        loss.set_ylabel("loss, nats a token")
        if loss.lines:  # a short run has logged none
            loss.legend(frameon=False)
        _draw_memory(memory, samples)
        memory.set_xlabel("step")
        memory.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (loss, memory):
            axis.yaxis.grid(True, color=GRID)
        figure.tight_layout()


def _draw_memory(axis: Axes, samples: list[Sample]) -> None:
    top = max((max(sample[1:]) for sample in samples), default=0)
    unit, name = choose_unit(top)
    steps = [sample[0] for sample in samples]
    for column, label, color in ((1, "card", _CARD), (2, "host", _HOST)):
        values = [sample[column] for sample in samples]
        if any(values):
            scaled = [value / unit for value in values]
            axis.plot(steps, scaled, color=color, label=f"{label}, at most {format_bytes(max(values))}")
    axis.set_ylim(0, top / unit * 1.15 or None)
    axis.set_ylabel(f"memory of rank 0, {name}")
    if samples:
        axis.legend(frameon=False, loc="lower right")

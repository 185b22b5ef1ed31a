"""The curves of a run as a picture: loss above, memory below, over the same steps."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..units import format_bytes
from .progress import Sample

_GIB, _MIB = 2**30, 2**20
_INK, _FAINT = "#23313f", "#8a97a3"
_LOSS, _HELD_OUT, _CARD, _HOST = "#2a6f97", "#c1121f", "#2a6f97", "#bc6c25"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_curves(history: list[dict[str, Any]], samples: list[Sample], title: str, file: str) -> None:
    """Draw a run.

    Args:
        history (`list[dict]`): What the trainer logged (`state.log_history`): `loss` and `eval_loss` by `step`.
        samples (`list[Sample]`): Memory of rank 0 after each step.
        title (`str`): Above the picture.
        file (`str`): PNG to write.
    """
    with plt.rc_context(_STYLE):
        figure, (loss, memory) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2))
        for name, label, color in (("loss", "training", _LOSS), ("eval_loss", "held out", _HELD_OUT)):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                loss.plot(*zip(*points, strict=True), color=color, marker="." * (len(points) < 50), label=label)
        loss.set_ylabel("loss, nats a token")
        loss.legend(frameon=False)
        _draw_memory(memory, samples)
        memory.set_xlabel("step")
        memory.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (loss, memory):
            axis.yaxis.grid(True, color="#e8eaec")
            axis.set_axisbelow(True)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.tight_layout()
        figure.savefig(file, dpi=160, format="png")
        plt.close(figure)


def _draw_memory(axis: Axes, samples: list[Sample]) -> None:
    top = max((max(sample[1:]) for sample in samples), default=0)
    unit, name = (_GIB, "GiB") if top > _GIB else (_MIB, "MiB")
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

"""How the pictures of this package look: one hand for plans, rehearsals and runs. Needs matplotlib.

Nothing here touches `pyplot`: a picture is drawn the same way on a machine without a display and in a notebook, whose
backend stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .units import format_bytes

INK, FAINT, GRID, LIMIT = "#23313f", "#8a97a3", "#e8eaec", "#c1121f"
BEHIND_TEXT: Any = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def picture(file: str, title: str, size: tuple[float, float], **subplots: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its axes, from the top down, and write it when all is drawn.

    Args:
        file (`str`): PNG to write.
        title (`str`): Above the picture.
        size (`tuple[float, float]`): Width and height in inches.
        **subplots: As in `Figure.subplots`.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes = figure.subplots(squeeze=False, **subplots)
        figure.suptitle(title, x=0.01, y=0.99, ha="left", va="top", fontsize=12, fontweight="bold")
        yield figure, list(axes[:, 0])
        figure.savefig(file, dpi=160, format="png")


def choose_unit(most_bytes: float) -> tuple[int, str]:
    """Return the unit in which so much is drawn, in bytes and by name."""
    return (2**30, "GiB") if most_bytes > 2**30 else (2**20, "MiB")


def mark_limit(axis: Axes, limit_bytes: float, most_bytes: float) -> None:
    """Draw the size of a card as a line, where it is near enough to what is drawn to be on the picture."""
    if limit_bytes > 2 * most_bytes:
        return
    limit = limit_bytes / choose_unit(most_bytes)[0]
    axis.axhline(limit, color=LIMIT, linestyle=(0, (5, 3)), linewidth=1.2)
    axis.annotate(
        f"a card has {format_bytes(limit_bytes)}",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color=LIMIT,
    )
    axis.set_ylim(0, max(axis.get_ylim()[1], limit * 1.12))


def list_layers(axis: Axes) -> None:
    """Put the legend of stacked layers beside the picture, the uppermost first."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False)

"""A plan as a picture: one bar a phase, stacked by cause, against what a card has."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..units import format_bytes
from .cards import HOLES
from .memory_estimate import PHASES
from .memory_model import CAUSES
from .planner import Plan

_GIB = 2**30
_INK, _FAINT, _LIMIT = "#23313f", "#8a97a3", "#c1121f"
_COLORS = {
    "4-bit codes": "#1b4965",
    "scales": "#2a6f97",
    "embedding, head and norms": "#468faf",
    "LoRA": "#386641",
    "optimizer": "#6a994e",
    "gradients": "#a7c957",
    "gathered units": "#89c2d9",
    "dequantised weights": "#bde0fe",
    "kept activations": "#bc6c25",
    "activations of a layer": "#dda15e",
    "loss": "#e9c46a",
    "loading": "#62b6cb",
    "workspaces": "#b7b7a4",
    "holes": "#dfe3e6",
    "CUDA, kernels, NCCL": "#cfd8dc",
}
_BEHIND = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
_STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK}
_STYLE |= {"axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _FAINT}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def draw_bars(plan: Plan, file: str) -> None:
    """Draw what a card holds in each phase.

    Args:
        plan (`Plan`): The plan.
        file (`str`): PNG to write.
    """
    bars = {phase: _stack(plan, phase) for phase in PHASES}
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(8.5, 5.2))
        bottoms = [0.0] * len(PHASES)
        for cause in [*CAUSES, "holes", "CUDA, kernels, NCCL"]:
            sizes = [bars[phase].get(cause, 0) / _GIB for phase in PHASES]
            if any(sizes):
                axis.bar(PHASES, sizes, bottom=bottoms, color=_COLORS[cause], label=cause, width=0.6, linewidth=0)
                bottoms = [below + size for below, size in zip(bottoms, sizes, strict=True)]
        for phase, top in zip(PHASES, bottoms, strict=True):
            axis.annotate(
                format_bytes(top * _GIB),
                (phase, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                bbox=_BEHIND,
            )
        limit = plan.machine.device_bytes
        axis.set_ylim(0, max(max(bottoms), limit / _GIB if limit < 2 * max(bottoms) * _GIB else 0) * 1.12)
        if limit < 2 * max(bottoms) * _GIB:
            axis.axhline(limit / _GIB, color=_LIMIT, linestyle=(0, (5, 3)), linewidth=1.2)
            text = f"a card has {format_bytes(limit)}"
            axis.annotate(text, (-0.42, limit / _GIB), xytext=(0, 3), textcoords="offset points", color=_LIMIT)
        axis.set_ylabel("a card when it is fullest, GiB")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False)
        title = f"{plan.model}: {plan.machine.num_gpus} cards, {plan.chosen.settings.seq} tokens"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        settings = plan.chosen.settings.describe(len(plan.weight.layers))
        axis.set_title(settings, loc="left", fontsize=9, color=_FAINT)
        figure.tight_layout(rect=(0, 0, 1, 0.98))
        figure.savefig(file, dpi=160, format="png")
        plt.close(figure)


def _stack(plan: Plan, phase: str) -> dict[str, int]:
    moment = plan.chosen.estimate.card[phase]
    rest = {"holes": round(HOLES * moment.total), "CUDA, kernels, NCCL": plan.chosen.estimate.outside}
    return dict(moment.sizes) | rest

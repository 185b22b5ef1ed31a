"""A plan as a picture: one bar a phase, stacked by cause, against what a card has."""

from __future__ import annotations

from ..pictures import BEHIND_TEXT, FAINT, INK, choose_unit, list_layers, mark_limit, picture
from ..units import format_bytes
from .cards import HOLES
from .memory_estimate import PHASES
from .memory_model import CAUSES
from .planner import Plan

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


def draw_bars(plan: Plan, file: str) -> None:
    """Draw what a card holds in each phase.

    Args:
        plan (`Plan`): The plan.
        file (`str`): PNG to write.
    """
    bars = {phase: _stack(plan, phase) for phase in PHASES}
    most = max(sum(bar.values()) for bar in bars.values())
    unit, name = choose_unit(most)
    title = f"{plan.model}: {plan.machine.num_gpus} cards, {plan.chosen.settings.seq} tokens"
    with picture(file, title, (8.5, 5.2)) as (figure, (axis,)):
        bottoms = [0.0] * len(PHASES)
        for cause in [*CAUSES, "holes", "CUDA, kernels, NCCL"]:
            sizes = [bars[phase].get(cause, 0) / unit for phase in PHASES]
            if any(sizes):
                axis.bar(PHASES, sizes, bottom=bottoms, color=_COLORS[cause], label=cause, width=0.6, linewidth=0)
                bottoms = [below + size for below, size in zip(bottoms, sizes, strict=True)]
        for phase, top in zip(PHASES, bottoms, strict=True):
            axis.annotate(
                format_bytes(top * unit),
                (phase, top),
                xytext=(0, -4),
                textcoords="offset points",
                ha="center",
                va="top",
                bbox=BEHIND_TEXT,
            )
        axis.set_ylim(0, most / unit * 1.12)
        mark_limit(axis, plan.machine.device_bytes, most)
        axis.set_ylabel(f"a card when it is fullest, {name}")
        axis.tick_params("x", colors=INK)
        list_layers(axis)
        axis.set_title(plan.chosen.settings.describe(len(plan.weight.layers)), loc="left", fontsize=9, color=FAINT)
        figure.tight_layout(rect=(0, 0, 1, 0.98))


def _stack(plan: Plan, phase: str) -> dict[str, int]:
    moment = plan.chosen.estimate.card[phase]
    rest = {"holes": round(HOLES * moment.total), "CUDA, kernels, NCCL": plan.chosen.estimate.outside}
    return dict(moment.sizes) | rest

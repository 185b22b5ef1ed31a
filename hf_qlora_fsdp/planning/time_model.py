"""How long a step takes at least: what has to be computed, unpacked, gathered and copied, and what each allows.

    compute       multiplications of forward, backward and what is computed twice, at the rate of large ones
    dequantise    each 4-bit weight is read and its 16 bits are written, in each of these passes
    gather        what a rank receives of the others' shards, once in the forward and once in the backward
    host          what offloaded weights, and activations, cross the link to the host
    launches      Python and the launching of kernels, which a fast card waits for where the work is small

Gathering and copying run beside the computation, so a step takes the longest of the four, not their sum: at best. On
one rank FSDP gathers nothing ahead, and a layer waits until its weights have come from the host. What a real run adds
(norms and other passes over memory, waiting at the seams) is measured by `rehearse`.

Source:
    `speed/matmul_share.py` for the operations; QLoRA on FSDP needs no gradients of frozen weights, so 6 P a token with
    everything computed twice, not 8 P.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from ..speed.matmul_share import Multiplications, count_multiplications
from .cards import Card
from .layer_trial import fused_layers
from .settings import Settings
from .weighing import ModelWeight

EFFICIENCY = 0.8
"""Of the peak, what large multiplications reach: 790 of 989 TFLOP/s in bfloat16, H100, cuBLAS
(`speed/matmul_share.py`).
"""
LAUNCH_SECONDS = 0.015
"""A layer, its forward twice and its backward. Measured: `llama-3-8b: step`, batch 2, fused, Liger; the card waits:
0.55 s for 32 layers and what is around them."""
STEP_SECONDS = 0.02
"""The optimizer, clipping and logging."""


@dataclass(frozen=True)
class TimeBounds:
    """What a step takes at least, in seconds, by what bounds it.

    Args:
        compute (`float`), dequantise (`float`), gather (`float`), host (`float`), launches (`float`): See above.
        tokens (`int`): Of a step, on all ranks.
        host_waits (`float`): Of `host`, what nothing runs beside.
    """

    compute: float
    dequantise: float
    gather: float
    host: float
    launches: float
    tokens: int
    host_waits: float = 0.0

    @property
    def seconds(self) -> float:
        return self.host_waits + max(self._beside.values()) + STEP_SECONDS

    @property
    def bound(self) -> str:
        """What the step waits for."""
        times = self._beside
        most = max(times, key=lambda name: times[name])
        return most if times[most] >= self.host_waits else "the link to the host"

    @property
    def _beside(self) -> dict[str, float]:
        """What runs side by side."""
        return {
            "computing": self.compute + self.dequantise,
            "gathering": self.gather,
            "the link to the host": self.host - self.host_waits,
            "Python": self.launches,
        }

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def bound_time(weight: ModelWeight, settings: Settings, card: Card, link: float, host_link: float) -> TimeBounds:
    """Bound the time of a step.

    Args:
        weight (`ModelWeight`): The model.
        settings (`Settings`): The run.
        card (`Card`): On which it runs.
        link (`float`), host_link (`float`): Bytes a second between cards, and between a card and its host.
    """
    times = settings.gradient_accumulation_steps
    ranks, tokens, layers = settings.num_ranks, settings.tokens, weight.layers
    again = settings.recomputed(len(layers)) / max(len(layers), 1)
    counted = _count(weight, settings.fuse_lora)
    once, twice = (counted.flops_per_token(settings.seq, checkpointing=flag) for flag in (False, True))
    flops = tokens * (once + again * (twice - once))
    itemsize = weight.param_dtype.itemsize
    unpacked = (weight.num_packed * (2 + again) - counted.spared * again) * (0.5 + itemsize)

    replicated = settings.replicated(weight)  # their adapters are gathered once
    gathered = sum(
        unit.parts.gathered(ranks) * (1 if unit.unit.name in replicated else 2)
        for unit in settings.lay_out(weight).layers
    )
    received = gathered * (ranks - 1) / ranks
    offloaded = settings.offloaded(weight)
    regions = sum(unit.parts.frozen_matrices.region(ranks) for unit in weight.units if unit.unit.name in offloaded)
    kept = tokens * weight.config.get_text_config().hidden_size * itemsize * len(layers)
    # Activations go one way in the forward and the other in the backward; weights the same way in both.
    weights = times * 2 * regions / host_link
    activations = times * kept / host_link if settings.activation_offloading else 0.0
    return TimeBounds(
        compute=times * flops / (EFFICIENCY * card.flops),
        dequantise=times * unpacked / card.memory_rate,
        gather=times * received / link if ranks > 1 else 0.0,
        host=weights + activations,
        launches=times * LAUNCH_SECONDS * len(layers) * (2 + again) / 3,
        tokens=times * tokens * ranks,
        host_waits=weights if ranks == 1 else 0.0,
    )


class _Alone:
    """A layer that is counted as if it were a model."""

    def __init__(self, layer: Any, config: Any) -> None:
        self.modules, self.config = layer.modules, config

    def get_output_embeddings(self) -> None:
        return None


def _count(weight: ModelWeight, fuse: bool) -> Multiplications:
    """Count the matrices that a token passes, of all layers, fused or not."""
    key = "multiplications", fuse
    if key not in weight.trials:
        with fused_layers(weight) if fuse else contextlib.nullcontext():
            counts = {
                layer.kind: count_multiplications(_Alone(weight.base.get_submodule(layer.kind), weight.config))
                for layer in weight.layers
            }
        head = weight.base.get_output_embeddings()
        weight.trials[key] = Multiplications(
            frozen=sum(counts[layer.kind].frozen for layer in weight.layers),
            head=head.weight.numel() if head is not None else 0,
            trained=sum(counts[layer.kind].trained for layer in weight.layers),
            attention=next(iter(counts.values())).attention,
            spared=sum(counts[layer.kind].spared for layer in weight.layers),
            spared_trained=sum(counts[layer.kind].spared_trained for layer in weight.layers),
        )
    return weight.trials[key]

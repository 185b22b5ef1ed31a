"""What a run takes, everywhere: of each card by phase, of the host, of the disk.

The card's part is `memory_model.py`'s. Of the host, all ranks on it together take

    processes     Python, torch and the CUDA context, measured
    weights       the regions of offloaded units (`offloading/offload.py`), and three more for each rank through
                  which memory that is not pinned is copied (`offloading/staging.py`)
    activations   offloaded ones, which torch pins in blocks of powers of two
    reading       while loading, one tensor as it is stored and once more in the parameter dtype, for each rank

and of the disk the cache of quantised weights, files of offloaded ones, and for each checkpoint of the training the
adapter and its optimizer in float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..offloading.staging import NUM_SLOTS, choose_slot_bytes
from .cards import HOLES, outside_bytes
from .layer_trial import try_norm
from .memory_model import Moment, find_peaks
from .settings import Settings
from .weighing import ModelWeight

PHASES = ("load", "first step", "steady")
PROCESS_BYTES = 2_440_000_000
"""Of one rank. Measured: `planner 1b-b4: host, steady`, two ranks, less nothing else; torch 2.11 with CUDA 13."""
CHECKPOINT_BYTES = 12
"""A trained weight in float32 and the two moments of Adam."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, in bytes, by place and cause.

    Args:
        settings (`Settings`): The run.
        card (`dict[str, Moment]`): The fullest moment of each phase, of what torch allocates on a card.
        outside (`int`): What lies on a card outside of torch's allocator.
        host (`dict[str, Counter[str]]`): Each phase on one host, all its ranks together.
        disk (`Counter[str]`): Files, on one host.
    """

    settings: Settings
    card: dict[str, Moment]
    outside: int
    host: dict[str, Counter[str]]
    disk: Counter[str]

    @property
    def allocated_bytes(self) -> int:
        """What torch allocates on a card at most."""
        return max(moment.total for moment in self.card.values())

    @property
    def card_bytes(self) -> int:
        """What a card must have: that, room for holes between tensors, and what lies outside."""
        return round(self.allocated_bytes * (1 + HOLES)) + self.outside

    @property
    def host_bytes(self) -> int:
        """What a host must have."""
        return max(sizes.total() for sizes in self.host.values())

    @property
    def pinned_bytes(self) -> int:
        """What of this must not be swapped out."""
        sizes = self.host["steady"]
        frozen = sizes["offloaded weights"] if self.settings.pins_memory else sizes["staging"]
        return frozen + sizes["activations"]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {
            "settings": asdict(self.settings),
            "card": {
                phase: {"moment": m.name, "bytes": m.total, "causes": dict(m.sizes)} for phase, m in self.card.items()
            },
            "outside_allocator_bytes": self.outside,
            "allocated_bytes": self.allocated_bytes,
            "card_bytes": self.card_bytes,
            "host": {phase: dict(sizes) for phase, sizes in self.host.items()},
            "host_bytes": self.host_bytes,
            "pinned_bytes": self.pinned_bytes,
            "disk": dict(self.disk),
        }


def estimate(weight: ModelWeight, settings: Settings, compute_capability: int = 9) -> MemoryEstimate:
    """Estimate what a run takes.

    Args:
        weight (`ModelWeight`): The model.
        settings (`Settings`): The run.
        compute_capability (`int`): Major one of the cards.
    """
    return MemoryEstimate(
        settings,
        find_peaks(weight, settings, compute_capability),
        outside_bytes(settings.num_ranks),
        _find_host(weight, settings),
        _find_disk(weight, settings),
    )


def _find_host(weight: ModelWeight, settings: Settings) -> dict[str, Counter[str]]:
    per_host = settings.ranks_per_host
    offloaded = settings.offloaded(weight)
    regions = [
        unit.parts.frozen_matrices.region(settings.num_ranks) for unit in weight.units if unit.unit.name in offloaded
    ]
    at_rest = Counter({"processes": per_host * PROCESS_BYTES})
    if regions and not settings.mapped:
        at_rest["offloaded weights"] = per_host * sum(regions)
    tensor = max(unit.transient_bytes for unit in weight.units)
    loading = at_rest + Counter({"reading": per_host * 2 * tensor})
    if regions and not settings.pins_memory:
        at_rest["staging"] = per_host * NUM_SLOTS * choose_slot_bytes(regions)
    if settings.activation_offloading:
        at_rest["activations"] = per_host * _find_offloaded_activations(weight, settings)
    return {"load": loading, "first step": at_rest, "steady": at_rest}


def _find_offloaded_activations(weight: ModelWeight, settings: Settings) -> int:
    hidden = settings.tokens * weight.config.get_text_config().hidden_size * weight.param_dtype.itemsize
    norm = try_norm(weight, settings)
    large = norm.kept // hidden * hidden  # without one number a row
    # Each layer's input, what the last norm keeps, and the rows that the loss is computed of.
    return (len(weight.layers) + 1) * _round_to_power(hidden) + _round_to_power(large)


def _round_to_power(num_bytes: int) -> int:
    """Round up as torch's allocator of pinned memory does (c10/core/CachingHostAllocator.h)."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def _find_disk(weight: ModelWeight, settings: Settings) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for unit in weight.units:
        shards = unit.parts.shards(1)
        sizes["quantised weights, kept for the next time"] += shards.total() - shards["trained"]
        sizes["each checkpoint"] += CHECKPOINT_BYTES * shards["trained"] // 4
    if settings.mapped:
        offloaded = settings.offloaded(weight)
        regions = (
            unit.parts.frozen_matrices.region(settings.num_ranks)
            for unit in weight.units
            if unit.unit.name in offloaded
        )
        sizes["offloaded weights"] = settings.ranks_per_host * sum(regions)
    return sizes

"""Will it fit? Asked after the headers are read and before the weights are.

The peak of loading is known in advance, S + 2 U + T (`loader.py`). If a card, or the host, has less than that, loading
can only end in an out-of-memory error half an hour later, so it ends here, with what to change. Activations are not
counted: they depend on the batch, and a model that loads but does not train says so at the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from .units import format_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs while it loads.

    Args:
        shards_bytes (`int`): S, its part of all weights.
        unit_bytes (`int`): U, the largest unit, whole.
        tensor_bytes (`int`): T, the largest tensor of the checkpoint.
        offloaded (`bool`): Whether the shards lie on the host.
        world_size (`int`): Ranks that share the weights.
        ranks_per_host (`int`): Ranks that share a host's memory.
    """

    shards_bytes: int
    unit_bytes: int
    tensor_bytes: int
    offloaded: bool
    world_size: int
    ranks_per_host: int

    def peak(self, device_type: str) -> dict[str, int]:
        """Return the peak by place: `"cuda"` for one card, `"host"` for all ranks of a host together."""
        transient = 2 * self.unit_bytes + self.tensor_bytes
        if device_type == "cpu":
            return {"host": self.ranks_per_host * (self.shards_bytes + transient)}
        on_device = transient + (0 if self.offloaded else self.shards_bytes)
        on_host = self.tensor_bytes + (self.shards_bytes if self.offloaded else 0)
        return {"cuda": on_device, "host": self.ranks_per_host * on_host}


def available_bytes(device: torch.device, with_swap: bool) -> dict[str, int]:
    """Return what is free on this rank's card and on its host."""
    host = psutil.virtual_memory().available + (psutil.swap_memory().free if with_swap else 0)
    return {"host": host} if device.type == "cpu" else {"cuda": torch.cuda.mem_get_info(device)[0], "host": host}


def check_fits(model: str, need: Need, device_type: str, available: dict[str, int]) -> None:
    """Refuse a model that cannot even be loaded.

    Args:
        model (`str`): What to call it.
        need (`Need`): What one rank needs.
        device_type (`str`): Where it computes, `"cuda"` or `"cpu"`.
        available (`dict[str, int]`): What is free, see `available_bytes`.
    Raises:
        ValueError: A place has less free memory than loading takes. Says by how much, and what would help.
    """
    for place, needed in need.peak(device_type).items():
        if needed <= available[place]:
            continue
        owner = f"each of {need.world_size} cards" if place == "cuda" else f"the host, for {need.ranks_per_host} ranks,"
        raise ValueError(
            f"{model!r} in 4 bits over {need.world_size} ranks needs {format_bytes(needed)} on {owner} while it "
            f"loads, and {format_bytes(available[place])} are free. {_advice(place, need)}"
        )


def _advice(place: str, need: Need) -> str:
    more = f"Launch more ranks (torchrun --nproc_per_node {2 * need.world_size})"
    if place == "cuda":
        return f"{more}, or write cpu_offload=True." if not need.offloaded else f"{more} on cards with more memory."
    if need.offloaded:
        return "Leave cpu_offload out, add swap and write cpu_offload_pin_memory=False, or use more hosts."
    return "Use a host with more memory, or a smaller model."

"""Will it fit? Asked after the headers are read and before the weights are.

The peak of loading is known in advance, S + 2 U + T of whichever unit has most of it (`loader.py`). If a card, the
host, or the disk that shards are mapped from has less than that, loading can only end in an out-of-memory error half an
hour later, so it ends here, with what to change. Activations are not counted: they depend on the batch, and a model
that loads but does not train says so at the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..errors import DoesNotFitError
from ..host import free_memory_bytes
from ..units import format_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs while it loads.

    Args:
        resident_bytes (`int`): S, its part of all weights that stay where the computation is.
        offloaded_bytes (`int`): Its part of those that go to the host.
        staging_bytes (`int`): Pinned memory through which these are copied.
        mapped (`bool`): Whether they go to a file on the host's disk.
        kept (`bool`): Whether that file is there already, from an earlier run.
        transient_bytes (`int`): 2 U + T, of the unit that has most of it.
        tensor_bytes (`int`): The largest T, which is on the host while it is read.
        world_size (`int`): Ranks that share the weights.
        ranks_per_host (`int`): Ranks that share a host's memory.
        replicated_bytes (`int`): Of what stays, what every rank holds whole (`replicate_layers`).
    """

    resident_bytes: int
    transient_bytes: int
    tensor_bytes: int
    world_size: int
    ranks_per_host: int
    offloaded_bytes: int = 0
    staging_bytes: int = 0
    mapped: bool = False
    kept: bool = False
    replicated_bytes: int = 0

    def peak(self, device_type: str) -> dict[str, int]:
        """Return the peak by place: `"cuda"` for one card, `"host"` and `"disk"` for all ranks of a host together."""
        on_device = self.resident_bytes + self.transient_bytes
        on_host = self.staging_bytes + (0 if self.mapped else self.offloaded_bytes)
        peak = {"disk": self.ranks_per_host * self.offloaded_bytes} if self.mapped and not self.kept else {}
        if device_type == "cpu":
            return peak | {"host": self.ranks_per_host * (on_device + on_host)}
        return peak | {"cuda": on_device, "host": self.ranks_per_host * (self.tensor_bytes + on_host)}


def available_bytes(device: torch.device, *, with_swap: bool, folder: Path | None = None) -> dict[str, int]:
    """Return what is free on this rank's card, on its host, and on the disk of a folder.

    Args:
        device (`torch.device`): The card, or the CPU.
        with_swap (`bool`): Whether memory that may be swapped out is of use.
        folder (`Path`, *optional*): Where shards are mapped from.
    """
    free = {"host": free_memory_bytes(with_swap=with_swap)}
    if device.type != "cpu":
        unused, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - torch.cuda.memory_reserved(device)
        free["cuda"] = min(unused, allowed)
    if folder is not None:
        free["disk"] = psutil.disk_usage(str(folder)).free
    return free


def check_fits(model: str, need: Need, device_type: str, available: dict[str, int]) -> None:
    """Refuse a model that cannot even be loaded.

    Args:
        model (`str`): What to call it.
        need (`Need`): What one rank needs.
        device_type (`str`): Where it computes, `"cuda"` or `"cpu"`.
        available (`dict[str, int]`): What is free, see `available_bytes`. A place that is not in it is not asked.
    Raises:
        DoesNotFitError: A place has less free memory than loading takes. Says by how much, and what would help.
    """
    owners = {
        "cuda": f"each of {need.world_size} cards",
        "host": f"the host, for {need.ranks_per_host} ranks,",
        "disk": f"the disk of cpu_offload_dir, for {need.ranks_per_host} ranks,",
    }
    for place, needed in need.peak(device_type).items():
        if needed > available.get(place, needed):
            said = (
                f"{model!r} in 4 bits over {need.world_size} ranks needs {format_bytes(needed)} on {owners[place]} "
                f"while it loads, and {format_bytes(available[place])} are free."
            )
            raise DoesNotFitError(said, _advice(place, need), place, needed - available[place])


def _advice(place: str, need: Need) -> str:
    more = f"Launch more ranks (torchrun --nproc_per_node {2 * need.world_size})"
    if place == "disk":
        return "Free some, or name a folder on a larger disk."
    if place == "cuda" and need.replicated_bytes:
        size = format_bytes(need.replicated_bytes)
        return f"Write a smaller replicate_layers, or leave it out: layers that are whole on every card take {size}."
    if place == "cuda":
        return f"{more}, or write cpu_offload=True." if not need.offloaded_bytes else f"{more} on larger cards."
    if need.offloaded_bytes and not need.mapped:
        return (
            "Leave cpu_offload out, or offload fewer layers (cpu_offload_layers). Or write cpu_offload_dir=PATH, which "
            "needs a disk instead; or add swap and write cpu_offload_pin_memory=False."
        )
    return "Use a host with more memory, or a smaller model."

"""How many layers can keep their activations: what a step leaves of the memory, and what a layer saves.

Both are measured, in steps of so many tokens; `checkpointing.py` does that. For more tokens both are taken to grow in
proportion, weights and optimizer states included, which do not: what is left is rather too little than too much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from ..host import free_memory_bytes
from ..ranks import local_world_size

LEFT_FREE = 0.05
"""Of the memory that may be used, what no layer is given: for what one batch takes more than another, and for new holes
between tensors. Chosen, not measured: the holes of a step without kept layers are in what is measured of it."""


def count_kept(num_layers: int, room_bytes: int, saved_bytes: int) -> int:
    """Return how many layers may keep what they save.

    Args:
        num_layers (`int`): How many there are.
        room_bytes (`int`): What is free at the peak of a step in which no layer does; negative if nothing is.
        saved_bytes (`int`): What one layer saves.
    """
    return max(0, min(num_layers, room_bytes // max(saved_bytes, 1)))


def scale(num_bytes: int, num_tokens: int, measured_tokens: int) -> int:
    """Return what so many tokens take of which others, fewer or as many, took `num_bytes`. Nothing known: the same."""
    return num_bytes * max(num_tokens, measured_tokens) // measured_tokens if measured_tokens else num_bytes


@dataclass(frozen=True)
class Room:
    """What a step may take, and what one took.

    Args:
        allowed_bytes (`int`): What may be used, less what is left free.
        peak_bytes (`int`): What the first step took of it.
    """

    allowed_bytes: int
    peak_bytes: int

    def left(self, num_tokens: int, measured_tokens: int) -> int:
        """Return what is left at the peak of a step of so many tokens; weights are taken to grow with them, too."""
        return self.allowed_bytes - scale(self.peak_bytes, num_tokens, measured_tokens)


def find_room(device: torch.device) -> Room:
    """Return what may be used, and what was while a step was at its peak.

    On a card: of what this process may use (`torch.cuda.set_per_process_memory_fraction`) and other programs leave it.
    On a host: of what is free now, each rank its share; what the step took is not known there, and not in it.
    """
    if device.type != "cuda":
        return Room(int(free_memory_bytes(with_swap=False) * (1 - LEFT_FREE)) // local_world_size(), 0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.memory.get_per_process_memory_fraction(device)
    allowed_bytes = min(int(fraction * total_bytes), free_bytes + torch.cuda.memory_reserved(device))
    return Room(int(allowed_bytes * (1 - LEFT_FREE)), torch.cuda.max_memory_reserved(device))


@contextlib.contextmanager
def count_saved_bytes(layer: nn.Module) -> Iterator[dict[int, int]]:
    """Count what autograd saves in the forward of a layer: less its weights, its inputs, and what all layers share.

    Returns:
        `dict[int, int]`: The bytes of each block of memory, by its address.
    """
    storages: dict[int, int] = {}
    known: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    saving = saved_tensors_hooks(pack, lambda tensor: tensor)
    entered = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known.update(tensor.untyped_storage().data_ptr() for tensor in [*tensors, *module.parameters()])
        saving.__enter__()
        entered.append(True)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()
        saving.__exit__(None, None, None)

    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True), layer.register_forward_hook(end)]
    try:
        yield storages
    finally:
        for handle in handles:
            handle.remove()
        if entered:  # the forward was left by an exception
            saving.__exit__(None, None, None)

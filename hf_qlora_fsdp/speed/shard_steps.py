"""Clipping and the optimizer's step, on the shards themselves.

Parameters, gradients and moments are `DTensor`s, each of which asks anew, in Python, how an operation on it is to be
distributed. For the thousand LoRA matrices of a 70B model that takes a tenth of a second a step, in which the GPU
waits, and tens of seconds in the first step. There is nothing to ask: an Adam step treats every element by itself, and
a norm is a sum of squares over all elements. So both run on what a rank holds, and one number is exchanged for the
norm.

Nothing else knows: parameters and moments stay `DTensor`s, in the optimizer's state and in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def step_on_shards(optimizer: torch.optim.Optimizer) -> None:
    """Let an Adam or AdamW of torch compute with this rank's shards. Others are left as they are.

    Not every optimizer treats each element by itself, and not every one gathers what it computes with in one place.

    Args:
        optimizer (`torch.optim.Optimizer`): Of sharded parameters.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    adam: Any = optimizer
    collect = adam._init_group

    def collect_shards(group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:
        has_complex = collect(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, numbers of steps
            tensors[:] = map(_shard, tensors)
        return has_complex

    adam._init_group = collect_shards


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their norm, over all parameters and ranks, is at most `max_norm`. A collective.

    Args:
        parameters (`Iterable[nn.Parameter]`): Sharded ones, and whole ones whose gradients are equal on all ranks.
        max_norm (`float`): The largest norm that is left as it is. If it is infinite, gradients are not touched.
    Returns:
        `torch.Tensor`: The norm before.
    Source:
        `torch.nn.utils.clip_grad_norm_`, the constant included.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    local = [gradient.to_local() for gradient in shards]
    norm = get_total_norm(local)
    if shards:
        squares = norm.square()
        dist.all_reduce(squares, group=shards[0].device_mesh.get_group())
        norm = squares.sqrt()
    if whole:
        norm = torch.hypot(norm, get_total_norm(whole).to(norm.device))
    if math.isinf(max_norm):  # torch multiplies even then, by inf / inf where a gradient is infinite
        return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in (*local, *whole):
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))
    return norm


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

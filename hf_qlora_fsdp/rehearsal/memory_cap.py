"""A large card that behaves like a smaller one.

Torch can be told how much its allocator may take, but a card of 24 GiB does not give its allocator 24 GiB: the CUDA
context, NCCL's buffers and the code of the kernels lie on it as well. `MemoryCap` measures them (what the driver says
is in use, less what the allocator holds) and leaves the allocator the rest. They grow with each kernel and each kind of
collective that is used for the first time, most of them in the first step: until then much room is kept for them,
afterwards little, and they are measured again before each step.

Between two measurements they may push what is in use beyond the cap, which a smaller card would have answered with an
error. Whoever rehearses therefore compares the peak that the driver saw with the cap, too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..planning.cards import FIRST_USE_BYTES
from ..units import format_bytes

LATER_BYTES = 16 << 20
"""What still comes once each kernel has run. Measured in five steps of a 70B model: 0.9 MiB."""

FIRST_STEP_BYTES = FIRST_USE_BYTES + LATER_BYTES
"""What is kept free until each kernel has run once: what a plan counts for their code, and what still comes later."""


class MemoryCap:
    """Holds one card, on which nobody else is, to a number of bytes.

    Args:
        limit_bytes (`int`): What may be in use, everything included.
        device (`torch.device`): The card.
    Raises:
        ValueError: The device is no card, has less than that, or needs more than that before anything is loaded.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        given = f"--device-memory {format_bytes(limit_bytes)}"
        if device.type != "cuda":
            raise ValueError(
                f"{given} limits what a process may take of a card, and this machine trains on the CPU. Leave it out; "
                "the memory of the host can be limited by a cgroup."
            )
        self.limit_bytes, self.device = limit_bytes, device
        self.total_bytes = torch.cuda.mem_get_info(device)[1]
        if limit_bytes > self.total_bytes:
            raise ValueError(
                f"{given} is more than the {format_bytes(self.total_bytes)} of {torch.cuda.get_device_name(device)}, "
                "which cannot show what a larger card would do. Give less, or leave it out."
            )
        _use_collectives(device)
        self.first_outside_bytes = self.outside_bytes = self._measure()
        if self.outside_bytes >= limit_bytes:
            raise ValueError(
                f"{given} is less than the {format_bytes(self.outside_bytes)} that CUDA, NCCL and other programs take "
                "of this card before anything is loaded. Give more, and have the card to yourself."
            )
        self.settle(FIRST_STEP_BYTES)

    def settle(self, expected_bytes: int = LATER_BYTES) -> None:
        """Measure anew what lies outside of the allocator, and leave the allocator the rest.

        Args:
            expected_bytes (`int`): What is expected to come to lie outside before the next measurement.
        """
        self.outside_bytes = self._measure()
        allowed = max(self.limit_bytes - self.outside_bytes - expected_bytes, 0)
        if torch.cuda.memory_reserved(self.device) > allowed:
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(allowed / self.total_bytes, self.device)

    def _measure(self) -> int:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)


def _use_collectives(device: torch.device) -> None:
    """Run each collective that FSDP runs, once: NCCL allocates when it first needs to."""
    whole = torch.zeros(dist.get_world_size() << 20, device=device)
    part = torch.zeros(1 << 20, device=device)
    dist.all_reduce(whole)
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, whole)
    dist.broadcast(whole, src=0)
    torch.cuda.synchronize(device)

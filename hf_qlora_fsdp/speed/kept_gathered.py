"""Gathered once a step instead of once a micro-batch, where units stay gathered from forward to backward anyway.

With `reshard_after_forward=False` every unit is whole from its forward to its backward: at the end of a forward the
whole 4-bit model is. Freeing a unit in the backward of a micro-batch, to gather it again in the forward of the next,
saves nothing at that peak, and no weight has changed in between. So it stays until the last micro-batch of the step. So
do the adapters of replicated layers (`replicate_layers`), which are small.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule


class KeptGathered:
    """Keeps units gathered between the micro-batches of a step.

    Args:
        modules (`Iterable[nn.Module]`): Modules, of which those that FSDP has made a unit of are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.units = [module for module in modules if isinstance(module, FSDPModule)]
        self.frees = True

    def begin(self, is_last: bool) -> None:
        """Say, before a micro-batch, whether it is the last one of its step, whose backward frees the units."""
        if is_last != self.frees:
            self.frees = is_last
            for unit in self.units:
                unit.set_reshard_after_backward(is_last, recurse=False)

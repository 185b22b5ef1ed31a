"""Gathered once a step instead of once a micro-batch, where the model stays gathered from forward to backward anyway.

With `reshard_after_forward=False` every unit is whole from its forward to its backward: at the end of a forward the
whole 4-bit model is. Freeing a unit in the backward of a micro-batch, to gather it again in the forward of the next,
saves nothing at that peak, and no weight has changed in between. So it stays until the last micro-batch of the step.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


class KeptGathered:
    """Keeps the units of a model gathered between the micro-batches of a step.

    Args:
        model (`nn.Module`): The sharded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.frees = True

    def begin(self, is_last: bool) -> None:
        """Say, before a micro-batch, whether it is the last one of its step, whose backward frees the units."""
        if is_last != self.frees:
            self.frees = is_last
            for unit in self.units:
                unit.set_reshard_after_backward(is_last, recurse=False)

"""TRL's LM head asks the device which positions have a label, and the host waits for the whole forward to be done.

On GPUs the head scores only those positions, and to pick them takes their number. Where nearly all have one, as in
packed or plain text, there is next to nothing to spare: to score all of them costs a percent of a step for every eighth
of its positions, while a host that waits there begins the backward with nothing queued. TRL has another path, for
devices that are bad at changing shapes, which scores all positions and leaves out what was of no use; this patch takes
it where at most an eighth is.

How many there are is counted when the batch comes in, and read when the head is reached: it has long been known then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import Patch

MOST_IGNORED = 1 / 8


class _Count:
    """The number of positions whose label is to be ignored, on its way to the host."""

    def __init__(self, labels: torch.Tensor) -> None:
        ignored = labels[..., 1:] == -100
        self.num_positions = ignored.numel()
        self.arrived: torch.cuda.Event | None = None
        if labels.is_cuda:
            self.number = torch.empty((), dtype=torch.int64, pin_memory=True)
            self.number.copy_(ignored.sum(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.number = ignored.sum()

    def is_small(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.number.item() <= MOST_IGNORED * self.num_positions


_count: _Count | None = None


@contextlib.contextmanager
def counted_labels(labels: Any) -> Iterator[None]:
    """Let the head know, in here, how many positions of a batch have no label.

    Args:
        labels (`torch.Tensor`, *optional*): `[batch, seq]`, -100 where nothing is to be predicted.
    """
    global _count
    before, _count = _count, _Count(labels) if isinstance(labels, torch.Tensor) else None
    try:
        yield
    finally:
        _count = before


def _build(original: Callable) -> Callable:
    def _use_triton(device: torch.device) -> bool:
        return original(device) and not (_count is not None and _count.is_small())

    return _use_triton


PATCH = Patch(
    name="trl-head-positions",
    target="trl.trainer.utils:_use_triton",  # asked for nothing else there: the kernels have the name from elsewhere
    affects="trl>=1.16,<1.17",
    symptom="The host waits for every forward, to pick positions that have labels where nearly all have.",
    upstream="https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py",
    remove_when="the fused LM head of TRL scores all positions, or is told how many have a label",
    build=_build,
)

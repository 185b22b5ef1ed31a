"""Leaving losses that are no numbers out of the log, without waiting for the device.

`logging_nan_inf_filter`, which is on by default, has transformers log the average so far in place of a loss that is
infinite or not a number. To see whether it is, it reads every micro-batch's loss as soon as the backward is queued, so
the host waits until the device has done it all, and only then begins with the next forward, or with clipping. Here the
device itself chooses between the two, and transformers, which asks its arguments next, is told that nothing is to be
filtered, until it has asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class LossFilter:
    """Does on the device what `logging_nan_inf_filter` asks for.

    Args:
        trainer (`Trainer`): Calls `filter` last thing in its `training_step`, and `restore` in what it does next.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.is_at_work = self.is_due = False

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Filter while upstream's loop runs, and however it ends, leave the arguments as they were.

        Without it nobody asks them, and there is no average.
        """
        self.is_at_work = True
        try:
            yield
        finally:
            self.is_at_work = False
            self.restore()

    def filter(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's loss, or what is logged in its place.

        Source:
            `Trainer._run_epoch` of transformers 5.23, "if loss is nan or inf simply add the average of previous logged
            losses".
        """
        trainer = self.trainer
        self.restore()  # in case a script counts operations in its own way
        if not (self.is_at_work and trainer.args.logging_nan_inf_filter):
            return loss
        trainer.args.logging_nan_inf_filter, self.is_due = False, True
        num_steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, trainer._tr_loss / num_steps)

    def restore(self) -> None:
        """Let the arguments say again what they said."""
        if self.is_due:
            self.trainer.args.logging_nan_inf_filter, self.is_due = True, False

"""What may go wrong in the middle of a run, and what is done about it.

**Preemption.** Schedulers announce the end: SIGTERM, or SIGUSR1 as Slurm can be told to send. The step is finished, a
checkpoint is saved, and the process exits with `EXIT_PREEMPTED`. (torchrun reports its workers' codes in its log, and
exits with 1 whatever they are.) Signals reach ranks at different moments, and all must stop at the same step: at the
end of each they tell one another, which costs one tiny reduction.

**Numbers that are none.** A loss or gradient that is infinite or not a number ruins every weight in one step, and the
logs do not show it: transformers replaces such losses by their average (`logging_nan_inf_filter`). The norm of all
gradients, computed for clipping anyway, is looked at before each optimizer step; it is finite only if every loss and
every gradient is. The run stops, or the step is skipped, with the rank named whose loss it was.

In float16 the loss is scaled up before the backward, and gradients that overflow are how the scaler finds its scale: it
skips the step and halves it. That is left to it, as long as every loss is finite and there is something to halve.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import NonFiniteError
from ..ranks import collective_device, log_once

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: "temporary failure, try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionCallback(TrainerCallback):
    """Ends training at a step's end, with a checkpoint, once any rank has been told to stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.preempted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.received, self.preempted = None, False
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        flag = torch.tensor([self.received or 0], dtype=torch.int32, device=collective_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            self.preempted = control.should_save = control.should_training_stop = True
            name = signal.Signals(int(flag.item())).name
            log_once("%s received: saving after step %d and stopping.", name, state.global_step)
            self._leave_out_evaluation(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.preempted:  # the step's end has saved already
            control.should_save = False
            self._leave_out_evaluation(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _leave_out_evaluation(self, control: TrainerControl) -> None:
        if control.should_evaluate:  # it would come before the saving, and little time is left
            log_once("The evaluation that was due now is left out.")
            control.should_evaluate = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number


class GradientWatch:
    """Looks at the norm of all gradients before each optimizer step.

    Args:
        on_nonfinite (`str`): `"stop"` or `"skip"`.
    """

    def __init__(self, on_nonfinite: str) -> None:
        self.on_nonfinite = on_nonfinite
        self.loss: torch.Tensor | None = None
        self.num_skipped = 0

    def observe(self, loss: torch.Tensor) -> None:
        """Take note of a loss. Several make a step, and their sum is finite only if each is."""
        self.loss = loss if self.loss is None else self.loss + loss

    def examine(
        self,
        model: nn.Module,
        norm: torch.Tensor | float,
        step: int,
        last_checkpoint: Callable[[], object],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Stop or skip the step if the norm is infinite or not a number. A collective only in that case.

        Args:
            model (`nn.Module`): The model; its gradients are dropped when the step is skipped.
            norm (`torch.Tensor` or `float`): Norm of all gradients, the same on every rank.
            step (`int`): The step that is about to be taken.
            last_checkpoint (`Callable`): Finds where to go back to.
            scaler (`torch.amp.GradScaler`, *optional*): Of float16.
        Raises:
            NonFiniteError: The norm is not finite, and the run is to stop.
        """
        loss, self.loss = self.loss, None
        if torch.isfinite(torch.as_tensor(norm)).all():
            return
        losses: list[float | None] = [None] * dist.get_world_size()
        dist.all_gather_object(losses, None if loss is None else float(loss))
        bad = {rank: loss for rank, loss in enumerate(losses) if loss is not None and not _is_finite(loss)}
        cause = f"the loss of rank {min(bad)} is {bad[min(bad)]}" if bad else "every loss is finite"
        if scaler is not None and not bad:
            if scaler.get_scale() > 1:
                return
            cause += f", and the loss scale has fallen to {scaler.get_scale()}"
        message = f"The norm of the gradients is {float(norm)} at step {step}; {cause}."
        if self.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{message} One such step ruins every weight, so training stops before it. Last checkpoint: "
                f"{last_checkpoint() or 'none'}. Lower learning_rate, look at the data of this step, or write "
                'on_nonfinite="skip".'
            )
        self.num_skipped += 1
        if scaler is None:  # which skips by itself, but wants to see the gradients
            for parameter in model.parameters():
                parameter.grad = None  # optimizers pass over parameters without a gradient: no decay, no momentum
        log_once("%s The step is skipped (%d so far).", message, self.num_skipped)


def _is_finite(value: float) -> bool:
    return value - value == 0

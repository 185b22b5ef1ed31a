"""Reading TRL's metrics once a step, when the device is waited for anyway.

Between forward and backward TRL counts tokens, and sums up entropy and accuracy: four gathers over all ranks, one after
the other, and five numbers read from the device. With each the host waits until the device has done all it was given,
and the device then waits until the host has queued something new.

None of these numbers is needed before it is logged. So while TRL computes the loss, `gather_for_metrics` returns a
[`LateNumber`], which is like the tensor that it stands for, and writes down what is done with it:

    num_valid = gather_for_metrics(mask.sum()).sum()      tape:  gathered, its sum,
    (entropy_sum / num_valid).item()                             a quotient, its item, ...

Once the step's backward is queued, and before the norm of its gradients is read, all that was to be gathered is
gathered at once, and the tape is played on the host: the same operations, in the same order, on the same numbers.
Outside of a step nobody meets anything but plain numbers; between its micro-batches (`on_substep_end`) a callback does.

Only one thing cannot be put off, and that is a branch. `num_valid > 0`, which keeps TRL from dividing by nothing, is
taken to hold; where it turns out not to, quotients by that number are the 0.0 that TRL would have logged. Whatever
else is done with a late number settles everything on the spot, which is slower, and right as well, as long as all ranks
do it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

_UNKNOWN: Any = object()


class DeferredMetrics:
    """Puts off what a trainer's `compute_loss` gathers for its metrics.

    Args:
        trainer (`SFTTrainer`): Its `_metrics` and `_total_train_tokens` hold plain numbers again after `settle`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.tape: list[LateNumber] = []

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Let `gather_for_metrics` of the trainer's accelerator return late numbers."""
        accelerator = self.trainer.accelerator
        gather_now = accelerator.gather_for_metrics

        def gather_later(data: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(data, torch.Tensor) or data.ndim or args or kwargs:
                return gather_now(data, *args, **kwargs)
            state = accelerator.gradient_state
            # As upstream has it: of a last batch that was filled up, only so many gathered entries count.
            num_kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
            return LateNumber(self, _Gathered(data.detach(), num_kept))

        accelerator.gather_for_metrics = gather_later
        try:
            yield
        finally:
            accelerator.gather_for_metrics = gather_now

    def settle(self) -> None:
        """Find the value of all late numbers, and put it in their place. A collective, if there are any."""
        if not self.tape:
            return
        tape, self.tape = self.tape, []
        self._gather([number.function for number in tape if isinstance(number.function, _Gathered)])
        for number in tape:
            number.value = number.function(*map(_plain, number.operands))
            number.function, number.operands = _plain, ()
        for values in self.trainer._metrics["train"].values():
            values[:] = map(_plain, values)
        self.trainer._total_train_tokens = _plain(self.trainer._total_train_tokens)

    def forget(self, num_kept: int) -> None:
        """Drop what was written on the tape after the first so many numbers: a step is done again."""
        del self.tape[num_kept:]

    def _gather(self, wanted: list[_Gathered]) -> None:
        if not wanted:
            return
        accelerator = self.trainer.accelerator
        # Counts up to 2^53 and numbers of fewer bits are themselves in float64.
        mine = torch.stack([one.tensor.to(accelerator.device, torch.float64) for one in wanted])
        everyones = accelerator.gather(mine).view(-1, len(wanted)).cpu()
        for index, one in enumerate(wanted):
            one.gathered = everyones[:, index]


class _Gathered:
    """A number of each rank, in its own dtype: where a tape begins."""

    def __init__(self, tensor: torch.Tensor, num_kept: int | None) -> None:
        self.tensor, self.num_kept = tensor, num_kept
        self.gathered: Any = _UNKNOWN

    def __call__(self) -> torch.Tensor:
        return self.gathered[: self.num_kept].to(self.tensor.dtype)


class LateNumber:
    """Stands for a number, or for one of each rank, that is not known yet.

    Args:
        metrics (`DeferredMetrics`): Whose tape it is written on.
        function (`Callable`): What gives its value ...
        *operands: ... from these, late numbers among them.
    """

    def __init__(self, metrics: DeferredMetrics, function: Callable[..., Any], *operands: Any) -> None:
        self.metrics, self.function, self.operands = metrics, function, operands
        self.value = _UNKNOWN
        self.is_taken_for_positive = False
        metrics.tape.append(self)

    def sum(self) -> LateNumber:
        return LateNumber(self.metrics, torch.sum, self)

    def mean(self) -> LateNumber:
        return LateNumber(self.metrics, torch.mean, self)

    def item(self) -> LateNumber:
        return LateNumber(self.metrics, torch.Tensor.item, self)

    def __add__(self, other: Any) -> Any:
        return self._later(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._later(operator.add, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._later(operator.floordiv, self, other)

    def __truediv__(self, other: Any) -> Any:
        is_safe = isinstance(other, LateNumber) and other.is_taken_for_positive
        return self._later(_divide_or_zero if is_safe else operator.truediv, self, other)

    def __gt__(self, other: Any) -> bool:
        if self.value is _UNKNOWN and type(other) is int and other == 0:
            self.is_taken_for_positive = True
            return True
        return self.now() > other

    def _later(self, function: Callable[..., Any], *operands: Any) -> Any:
        if all(isinstance(operand, LateNumber | int | float) for operand in operands):
            return LateNumber(self.metrics, function, *operands)
        return function(*map(_now, operands))

    # -- everything else, at once ------------------------------------------------------------------------------------

    def now(self) -> Any:
        """Return the value, on the device where it would have been. A collective, if it is not known yet."""
        if self.value is _UNKNOWN:
            self.metrics.settle()
            assert self.value is not _UNKNOWN, "of a step that was given up"
        on_device = isinstance(self.value, torch.Tensor)
        return self.value.to(self.metrics.trainer.accelerator.device) if on_device else self.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map(_now, args), **tree_map(_now, kwargs or {}))

    def __repr__(self) -> str:  # also of what a debugger shows, on one rank: no collective
        return "a number that is not known yet" if self.value is _UNKNOWN else repr(self.value)


def _divide_or_zero(dividend: Any, divisor: Any) -> Any:
    return dividend / divisor if divisor > 0 else torch.zeros(())


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, LateNumber) else value


def _now(value: Any) -> Any:
    return value.now() if isinstance(value, LateNumber) else value


def _at_once(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def method(self: LateNumber, *others: Any) -> Any:
        operands = (*others, self) if swapped else (self, *others)
        return function(*map(_now, operands))

    return method


# Python looks these up in the class, and not with `__getattr__`.
_ANSWERS: list[Any] = [bool, float, int, format, round, abs, len, iter, operator.index, operator.neg, operator.getitem]
_COMPARISONS: list[Any] = [operator.lt, operator.le, operator.ge, operator.eq, operator.ne]
_ARITHMETIC: list[Any] = [operator.sub, operator.mul, operator.mod, operator.pow]
for _function in _ANSWERS + _COMPARISONS + _ARITHMETIC:
    setattr(LateNumber, f"__{_function.__name__}__", _at_once(_function))
for _function in [*_ARITHMETIC, operator.truediv, operator.floordiv]:
    setattr(LateNumber, f"__r{_function.__name__}__", _at_once(_function, swapped=True))

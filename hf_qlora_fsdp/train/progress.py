"""How a run is going, on rank 0: a bar on a terminal, plain lines elsewhere, and the figures for the end.

    12%|####          | 60/500 [02:10<15:53, loss=1.213, tokens/s=7,310, card=21.4 GiB]
    step 60 of 500  loss 1.213  7,310 tokens/s  card 21.4 GiB  15:53 left

Tokens are those of all ranks, padding left out, as TRL counts them; time that evaluations take is not counted against
the speed. Memory is what the driver says is in use on rank 0's card, or what its process holds of the host where there
is no card. It is looked at after each step, on every rank: what a step needs at most stays with torch's allocator until
then, so a card shows its peak.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..memory_trace import device_bytes, host_bytes
from ..units import format_bytes, format_seconds

Sample = tuple[int, int, int]
"""Step, bytes in use on the card, bytes of the host that the process holds."""


class Progress(TrainerCallback):
    """Shows a run and keeps count of it.

    Args:
        device (`torch.device`): This rank's card, or the CPU.
        bar (`bool`): Whether to draw a bar; lines are printed otherwise, one each time the trainer logs.
    """

    def __init__(self, device: torch.device, bar: bool) -> None:
        self.device, self.with_bar = device, bar
        self.samples: list[Sample] = []
        self.num_tokens = 0
        self._bar: Any = None
        self._began = self._last_log = time.monotonic()
        self._evaluated = self._evaluated_since_log = 0.0
        self._first_step = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks a second, from the beginning to the last time the trainer logged."""
        seconds = self._last_log - self._began - self._evaluated
        return self.num_tokens / seconds if seconds > 0 else 0.0

    @property
    def peak_bytes(self) -> tuple[int, int]:
        """The most that was in use on the card, and the most that this process held of the host (`ru_maxrss`)."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max((sample[1] for sample in self.samples), default=0), host

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._last_log = time.monotonic()
        self._first_step = state.global_step
        if self.with_bar and state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, file=sys.stdout)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.samples.append((state.global_step, device_bytes(self.device)[2], sum(host_bytes())))
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs, now = logs or {}, time.monotonic()
        if "eval_runtime" in logs:
            self._evaluated += logs["eval_runtime"]
            self._evaluated_since_log += logs["eval_runtime"]
            said = [f"{name} {value:.4g}" for name, value in logs.items() if name in ("eval_loss", "eval_runtime")]
            self._say(state, "  ".join([f"step {state.global_step} of {state.max_steps}", *said]))
        if "num_tokens" in logs:
            seconds = now - self._last_log - self._evaluated_since_log
            speed = (logs["num_tokens"] - self.num_tokens) / max(seconds, 1e-9)
            self.num_tokens, self._last_log, self._evaluated_since_log = int(logs["num_tokens"]), now, 0.0
            if "loss" in logs:
                self._show(state, float(logs["loss"]), speed)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.set_description("evaluating")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.set_description()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: TrainerState, loss: float, speed: float) -> None:
        _, card, host = self.samples[-1]
        place, num_bytes = ("card", card) if card else ("host", host)
        if self._bar is not None:
            shown = {"loss": f"{loss:.4g}", "tokens/s": f"{speed:,.0f}", place: format_bytes(num_bytes)}
            self._bar.set_postfix(shown)
            return
        done = state.global_step - self._first_step
        left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        self._say(
            state,
            f"step {state.global_step} of {state.max_steps}  loss {loss:.4g}  {speed:,.0f} tokens/s  "
            f"{place} {format_bytes(num_bytes)}  {format_seconds(left)} left",
        )

    def _say(self, state: TrainerState, line: str) -> None:
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

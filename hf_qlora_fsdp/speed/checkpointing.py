"""Computing again only as many decoder layers as memory demands.

With gradient checkpointing a layer keeps its input alone, and is computed a second time when its backward needs the
rest. That costs a third of a step, and on a large card much of it is spent for nothing. `checkpoint_layers` says how
many layers are computed twice: the first ones, since what the last ones keep is the first to be freed in the backward.

**"auto"** finds the number by measuring. All layers are computed twice in the first step, whose peak shows what a step
takes at least. In the second step the last layer keeps what it saves, and that is counted. What is left of the card,
less a margin, divided by what a layer saves, is how many keep it from the third step on. Every rank takes the least
that any rank found. A batch that is longer than those measured takes more, by as much as it is longer, so that fewer
layers keep what they save while it is there; ranks tell each other how long theirs is.

**Running out of memory** is no end: a measure is no promise. The step is undone (gradients
dropped, shards put back, random numbers and metrics as they were), a quarter of the layers that kept their activations
are computed twice from then on, and the step is done again on the same data. No bit of the result depends on any of
this.

Ranks can only go back together. If one ran out while another went on, the other waits for it in a collective, or has
already been answered by the wrong one; each rank tells the others how many it took part in, and where these numbers
differ, or a rank does not answer, the error is raised as it would have been.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..anatomy import decoder_layers
from ..ranks import log_once, rank
from ..units import format_bytes
from .activation_room import Room, count_kept, count_saved_bytes, find_room, scale
from .fsdp_state import forget_step
from .fusion import forget_outputs

_FIRST_STEP, _SECOND_STEP = 1, 2


@dataclass
class _MicroBatch:
    """What it takes to do a forward and backward again."""

    inputs: dict[str, Any]
    longest: int
    num_items: Any
    synchronizes: bool
    random_states: tuple[torch.Tensor, torch.Tensor | None]
    num_metrics: dict[str, int]
    num_tokens: float
    num_deferred: int


class LayerCheckpointing(TrainerCallback):
    """Decides which layers are computed twice, and does a step again that ran out of memory. Made by all ranks.

    Args:
        model (`nn.Module`): The sharded model.
        base (`PreTrainedModel`): The transformers model inside.
        wanted (`int` or `"auto"`): How many layers are computed twice.
        device (`torch.device`): This rank's.
        class_names (`list[str]`, *optional*): Classes of the decoder layers. Found from the model by default.
    Raises:
        ValueError: There are not so many, or they cannot be computed twice.
    """

    wait_seconds = 60.0
    """How long a rank that ran out of memory waits for the others to say so, too."""

    def __init__(
        self, model: Any, base: Any, wanted: int | str, device: torch.device, class_names: list[str] | None = None
    ) -> None:
        self.model, self.device = model, device
        self.layers: list[Any] = list(decoder_layers(base, class_names).values())
        if not all(hasattr(layer, "gradient_checkpointing") for layer in self.layers):
            raise ValueError(
                f"checkpoint_layers={wanted!r}, but layers of {type(base).__name__} cannot be computed twice one by "
                "one: they are no GradientCheckpointingLayer of transformers. Leave checkpoint_layers out."
            )
        if isinstance(wanted, int) and wanted > len(self.layers):
            raise ValueError(
                f"checkpoint_layers={wanted}, but the model has {len(self.layers)} decoder layers. Write a number up "
                'to that, or "auto".'
            )
        self.is_auto = wanted == "auto"
        self.num_recomputed = self.num_now = len(self.layers) if isinstance(wanted, str) else wanted
        self.num_steps = 0
        self.room = Room(0, 0)
        self.saved_bytes = 0
        self.longest = {_FIRST_STEP: 0, _SECOND_STEP: 0}
        self.micro_batches: list[_MicroBatch] = []
        # A group of its own: what ranks say here must not be mixed up with collectives that failed.
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    # -- which layers ------------------------------------------------------------------------------------------------

    def apply(self, num_recomputed: int) -> None:
        """Set which layers are computed twice; transformers sets all of them when training begins."""
        self.num_now = num_recomputed
        for index, layer in enumerate(self.layers):
            if layer.gradient_checkpointing != (index < num_recomputed):
                layer.gradient_checkpointing = index < num_recomputed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_steps += 1
        self.micro_batches.clear()
        if self.is_auto and self.num_steps == _FIRST_STEP and self.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading has left would count
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.is_auto and self.num_steps == _SECOND_STEP:
            self.num_recomputed = len(self.layers) - 1
        self.apply(self.num_recomputed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches.clear()
        if not self.is_auto:
            return
        if self.num_steps == _FIRST_STEP:
            self.room = find_room(self.device)
        elif self.num_steps == _SECOND_STEP and self.num_recomputed < len(self.layers):
            self._settle()

    def _settle(self) -> None:
        """Agree on how many layers may keep what they save."""
        figures = torch.tensor([-self.room.allowed_bytes, self.room.peak_bytes, self.saved_bytes], dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(figures, dist.ReduceOp.MAX, group=self.group)
        self.room, self.saved_bytes = Room(-int(figures[0]), int(figures[1])), int(figures[2])
        longest = max(self.longest.values())
        self.num_recomputed = self._count_recomputed(longest)
        log_once(
            'checkpoint_layers="auto": %d of %d decoder layers are computed twice. Each of the others keeps %s, for '
            "which the first step left %s.",
            self.num_recomputed,
            len(self.layers),
            format_bytes(scale(self.saved_bytes, longest, self.longest[_SECOND_STEP])),
            format_bytes(max(self.room.left(longest, self.longest[_FIRST_STEP]), 0)),
        )

    def _count_recomputed(self, num_tokens: int) -> int:
        """Return how many layers have to be computed twice for a batch of so many tokens, by what was measured."""
        room_bytes = self.room.left(num_tokens, self.longest[_FIRST_STEP])
        saved_bytes = scale(self.saved_bytes, num_tokens, self.longest[_SECOND_STEP])
        return len(self.layers) - count_kept(len(self.layers), room_bytes, saved_bytes)

    def _agree_on_longest(self, inputs: dict[str, Any]) -> int:
        """Return the tokens of the longest of all ranks' batches, where that matters."""
        if not self.is_auto or "input_ids" not in inputs:
            return 0
        longest = torch.tensor(inputs["input_ids"].numel())
        if self.group is not None:
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        if self.num_steps in self.longest:
            self.longest[self.num_steps] = max(self.longest[self.num_steps], int(longest))
        return int(longest)

    def _apply_to(self, batch: _MicroBatch) -> None:
        """Set which layers are computed twice in a micro-batch: more than usual in a longer one."""
        num_recomputed = self.num_recomputed
        if self.num_steps > _SECOND_STEP and batch.longest > max(self.longest.values()):
            num_recomputed = max(num_recomputed, self._count_recomputed(batch.longest))
        self.apply(num_recomputed)

    # -- a step, and once more ---------------------------------------------------------------------------------------

    def run(
        self, trainer: Any, compute: Callable[..., torch.Tensor], inputs: dict[str, Any], num_items: Any
    ) -> torch.Tensor:
        """Do forward and backward of a micro-batch; if memory runs out, undo the step so far and do it again.

        Args:
            trainer (`SFTTrainer`): Whose metrics are put back.
            compute (`Callable`): Its `training_step`, given the model, a dict of inputs and the number of items.
            inputs (`dict`): The micro-batch.
            num_items (`torch.Tensor` or `int`, *optional*): Tokens of the step.
        Returns:
            `torch.Tensor`: The loss.
        Raises:
            torch.OutOfMemoryError: Nothing is left to give up, or the ranks cannot go back together.
        """
        on_gpu = self.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None
        num_metrics = {name: len(values) for name, values in trainer._metrics["train"].items()}
        synchronizes = trainer.accelerator.sync_gradients
        longest = self._agree_on_longest(inputs)
        num_tokens, num_deferred = trainer._total_train_tokens, len(trainer.deferred_metrics.tape)
        this = _MicroBatch(inputs, longest, num_items, synchronizes, states, num_metrics, num_tokens, num_deferred)
        self.micro_batches.append(this)
        pending = [this]
        while True:
            loss: torch.Tensor | None = None
            said: str | None = None
            try:
                for batch in pending:
                    if len(pending) > 1:
                        self.model.set_requires_gradient_sync(batch.synchronizes)
                    self._apply_to(batch)
                    with self._counting():
                        loss = compute(self.model, dict(batch.inputs), batch.num_items)
            except torch.OutOfMemoryError as error:
                said = str(error).partition("\n")[0][:200]
                traceback.clear_frames(error.__traceback__)  # they hold what is to be freed
            if not self._somebody_ran_out(said):
                assert loss is not None
                return loss
            del loss
            self._give_way(said)
            pending = self.micro_batches
            self._put_back(trainer, pending[0])

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what the last layer saves, in the step that is there for it."""
        if not (self.is_auto and self.num_steps == _SECOND_STEP and self.num_recomputed < len(self.layers)):
            yield
            return
        with count_saved_bytes(self.layers[-1]) as storages:
            yield
        self.saved_bytes = max(self.saved_bytes, sum(storages.values()))

    def _somebody_ran_out(self, said: str | None) -> bool:
        """Return whether any rank ran out of memory, and see that all can go back from where they are."""
        if self.group is None:
            return said is not None
        number = dist.group.WORLD._get_backend(self.device)._get_sequence_number_for_group()  # type: ignore[union-attr]
        figures = torch.tensor([said is not None, number, -number], dtype=torch.int64)
        work = dist.all_reduce(figures, dist.ReduceOp.MAX, group=self.group, async_op=True)
        try:
            if said is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.wait_seconds))
        except RuntimeError as error:
            if said is None:
                raise
            raise self._final_error(f"{said} (rank {rank()}; the other ranks went on without it)") from error
        if not figures[0]:
            return False
        if figures[1] != -figures[2]:
            raise self._final_error(f"{said or 'Another rank ran out of memory'} (ranks are at different places)")
        return True

    def _give_way(self, said: str | None) -> None:
        """Free what the step took, and let more layers be computed twice."""
        num_kept = len(self.layers) - self.num_now
        forget_step(self.model)
        forget_outputs(self.model)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not num_kept:
            raise self._final_error(said or "Another rank ran out of memory")
        self.num_recomputed = len(self.layers) - num_kept * 3 // 4
        log_once(
            "Out of memory with %d of %d decoder layers computed twice: from now on it is %d, and the step is done "
            "again. %s",
            len(self.layers) - num_kept,
            len(self.layers),
            self.num_recomputed,
            said or "",
        )

    def _put_back(self, trainer: Any, batch: _MicroBatch) -> None:
        """Put random numbers and metrics back to where they were before the step."""
        random_state, device_state = batch.random_states
        torch.set_rng_state(random_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, self.device)
        for name, values in trainer._metrics["train"].items():
            del values[batch.num_metrics.get(name, 0) :]
        trainer._total_train_tokens = batch.num_tokens
        trainer.deferred_metrics.forget(batch.num_deferred)

    def _final_error(self, said: str) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"{said}. {self.num_now} of {len(self.layers)} decoder layers were computed twice. Leave "
            "checkpoint_layers out, which computes all of them twice, lower per_device_train_batch_size or "
            "max_length, or write activation_offloading=True."
        )

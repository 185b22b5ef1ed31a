"""A trainer whose checkpoints can be trusted: what is in them, when they appear, and how a run goes on from one.

`ResumableTrainer` is `SFTTrainer` with its saving and resuming replaced, for models that are sharded `PeftModel`s:

* a checkpoint holds the adapter, the optimizer's states and where the run stood, and nothing of the base;
* it appears whole (`checkpoints.py`): written aside, sealed with hashes, renamed, and only then are old ones pruned;
* no pickle is written or read: tensors are safetensors, everything else is JSON;
* resuming verifies it, refuses another base, adapter or batch (`continuity.py`), and goes on to the bit. The number of
  ranks may change, as long as the sequences a step stay the same;
* a signal or a number that is none ends the run in an orderly way (`watch.py`).

A rerun of the same script with `trainer.train(resume_from_checkpoint=True)` starts from the newest checkpoint that is
whole, or from the beginning if there is none, which is what `torchrun --max-restarts` and a requeued job need.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from ..export import load_adapters, load_optimizer, save_adapter, save_optimizer, synchronize, trained_adapters
from ..ranks import fail_together, log_once, rank
from ..sharding import base_model
from .checkpoints import STAGING_PREFIX, clear_leftovers, newest_valid, prune, publish, seal, verify
from .continuity import base_checksum, check_continues, compare_data, describe_data, describe_run, find_commit
from .random_states import load_random_states, save_random_states
from .watch import EXIT_PREEMPTED, GradientWatch, PreemptionCallback

_SCHEDULER_FILE = "scheduler.json"
_SCALER_FILE = "scaler.json"
_ARGUMENTS_FILE = "training_args.json"
_TRAINER_STATE_FILE = "trainer_state.json"


class ResumableTrainer(SFTTrainer):
    """`SFTTrainer` for a sharded `PeftModel`, with checkpoints that are whole or not there."""

    # What upstream declares as "perhaps not there yet" is there whenever the methods below run.
    model: Any
    optimizer: Any
    lr_scheduler: Any
    args: Any

    def __init__(self, **given: Any) -> None:
        self._staging: Path | None = None
        self._data: dict[str, Any] | None = None
        super().__init__(**given)
        self.gradient_watch = GradientWatch(self.args.on_nonfinite)
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train, from a checkpoint if one is named, or with `True` from the newest whole one if there is any.

        Raises:
            ValueError: The checkpoint is damaged, or belongs to another model, adapter or batch size.
            SystemExit: A signal asked for the end; the step was finished and saved. Its code is `EXIT_PREEMPTED`.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if checkpoint and self._is_finished(checkpoint):
            return TrainOutput(self.state.global_step, 0.0, {})
        if self.args.save_strategy != "no":
            base_checksum(self.model)  # now, since a signal may leave half a minute for the first checkpoint
        try:
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.preemption.release()
        if self.preemption.preempted:
            synchronize()  # a launcher ends the others as soon as the first one is gone
            raise SystemExit(EXIT_PREEMPTED)
        return output

    def _finalize_training(self, *args: Any) -> TrainOutput:
        if self.preemption.preempted:
            # Nothing is final: upstream would load the best adapter and, with save_total_limit=1, remove the
            # checkpoint that has just been saved to go on from.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.gradient_watch.observe(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once before each optimizer step, whether gradients are clipped or not."""
        norm = super()._get_grad_norm(model, grad_norm)
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        self.gradient_watch.examine(model, norm, step, lambda: newest_valid(self.args.output_dir)[0], scaler)
        return norm

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as plain PEFT files, and the tokenizer. All ranks must call it; rank 0 writes."""
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder)
        with fail_together(f"saving to {folder}"):
            if self.args.should_save:
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                (folder / _ARGUMENTS_FILE).write_text(self.args.to_json_string())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let upstream write the checkpoint aside, then seal it and give it its name."""
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        facts = self._facts()
        # Upstream puts "checkpoint-N" into the folder that `_get_output_dir` names.
        self._staging = run_dir / f"{STAGING_PREFIX}{final.name}"
        try:
            with fail_together(f"preparing {final}"):
                if rank() == 0:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    self._staging.mkdir(parents=True)
                    self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
            failure = None
            try:
                super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's own adds the model card, see above
            except Exception as error:
                failure = error  # what upstream writes by itself fails on rank 0 alone
            with fail_together(f"saving {final}"):
                if failure is not None:
                    raise failure
                if rank() == 0:
                    self._finish_checkpoint(self._staging / final.name, final, facts)
        except BaseException:
            if rank() == 0:  # a full disk is not helped by half a checkpoint
                shutil.rmtree(self._staging, ignore_errors=True)
                newest, _ = newest_valid(run_dir)
                log_once("%s was not saved. The newest that is whole is %s.", final, newest or "none")
            raise
        finally:
            self._staging = None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        synchronize()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _finish_checkpoint(self, written: Path, final: Path, facts: dict[str, Any]) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self.state.save_to_json(str(written / _TRAINER_STATE_FILE))
        seal(written, facts)
        publish(written, final)
        written.parent.rmdir()
        prune(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Wait: upstream calls this while the folder is still being written. `_save_checkpoint` pushes at its end."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self.optimizer.optimizer, output_dir)
        self._write_json(output_dir, _SCHEDULER_FILE, self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None:
            self._write_json(output_dir, _SCALER_FILE, self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        save_random_states(Path(output_dir))

    def _write_json(self, folder: str, name: str, value: Any) -> None:
        with fail_together(f"saving {name}"):
            if self.args.should_save:
                (Path(folder) / name).write_text(json.dumps(value))

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapters(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        log_once("Loading the best adapter, from %s.", self.state.best_model_checkpoint)
        load_adapters(self.model, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / _SCHEDULER_FILE).is_file():
            log_once("%s was saved without optimizer states: training goes on with fresh ones.", checkpoint)
            return
        load_optimizer(self.model, self.optimizer.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / _SCHEDULER_FILE).read_text()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            saved = Path(checkpoint) / _SCALER_FILE
            if saved.is_file():
                self.accelerator.scaler.load_state_dict(json.loads(saved.read_text()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / _SCHEDULER_FILE).is_file():
            return
        if not load_random_states(Path(checkpoint)):
            log_once("%s was saved by another number of ranks: random numbers (dropout) are drawn anew.", checkpoint)

    def _is_finished(self, checkpoint: str) -> bool:
        """Take over a checkpoint of the last step as it is; upstream would take one step more."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, _TRAINER_STATE_FILE))
        if not 0 < self.args.max_steps <= state.global_step:
            return False
        self.state = state
        load_adapters(self.model, checkpoint)
        log_once("%s is at step %d, and max_steps is %d: done.", checkpoint, state.global_step, self.args.max_steps)
        return True

    def _find_checkpoint(self, asked: str | bool | None) -> str | None:
        """Decide where to start: rank 0 looks, verifies and clears up, and all agree."""
        found: list[Any] = [None, None]
        with fail_together("looking for a checkpoint"):
            if rank() == 0:
                for name in clear_leftovers(self.args.output_dir):
                    log_once("%s, which a killed run left in %s, is cleared up.", name, self.args.output_dir)
                found = self._choose(asked)
        dist.broadcast_object_list(found, src=0)
        checkpoint, saved = found
        if checkpoint is None:
            return None
        facts = self._facts()
        with fail_together(f"resuming from {checkpoint}"):
            for difference in check_continues(checkpoint, saved, facts):
                log_once("Resuming with other versions: %s.", difference)
            self._check_position(checkpoint, saved, facts)
        if other_data := compare_data(saved, facts):
            log_once(
                "%s was saved in a run on other data: %s. Its steps are counted in the data as they are now, so rows "
                "may be seen twice or never. Pass the data of the checkpoint to have that run, or "
                "ignore_data_skip=True to start over in the new data.",
                checkpoint,
                other_data,
            )
        log_once("Resuming from %s.", checkpoint)
        return checkpoint

    def _choose(self, asked: str | bool | None) -> list[Any]:
        if not asked:
            return [None, None]
        if isinstance(asked, str | os.PathLike):
            return [str(asked), verify(asked)]
        newest, skipped = newest_valid(self.args.output_dir)
        for sentence in skipped:
            log_once("Passed over: %s", sentence)
        if newest is None:
            log_once("%s holds no checkpoint: training starts from the beginning.", self.args.output_dir)
            return [None, None]
        return [str(newest), verify(newest)]

    def _check_position(self, checkpoint: str, saved: dict[str, Any], facts: dict[str, Any]) -> None:
        """Refuse to count steps that have another size: data would be skipped or seen twice."""
        then, now = saved["sequences_per_step"], facts["sequences_per_step"]
        if then != now and not self.args.ignore_data_skip:
            raise ValueError(
                f"{checkpoint!r} was trained with {then} sequences a step ({saved['world_size']} ranks), and this run "
                f"has {now} ({facts['world_size']} ranks), so the place in the data cannot be counted in steps. Set "
                "per_device_train_batch_size and gradient_accumulation_steps so that their product with the number of "
                "ranks is the same, or ignore_data_skip=True to start over in the data."
            )

    def _facts(self) -> dict[str, Any]:
        name = str(base_model(self.model).config.name_or_path)
        options = self.args.model_init_kwargs or {}
        if self._data is None:
            self._data = describe_data(self.train_dataset)
        return describe_run(
            self.model,
            base_model=name,
            revision=find_commit(name, **{key: options[key] for key in ("revision", "cache_dir") if key in options}),
            peft_configs={name: self.model.peft_config[name] for name in trained_adapters(self.model)},
            sequences_per_step=self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * dist.get_world_size(),
            data=self._data,
        )

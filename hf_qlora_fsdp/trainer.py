"""`SFTTrainer`, with a model that fits on none of the cards.

Everything is settled **before** `SFTTrainer.__init__` runs: the arguments are translated, the dataset looked at, the
model loaded in 4 bits, fitted with its adapter and sharded. What reaches TRL is a `PeftModel` that is already an
`FSDPModule`, so TRL has nothing to load and accelerate nothing to wrap; batches, losses, logging, evaluation and the
training loop are theirs, unchanged.

    model id or folder -> load_quantized_model  \\
    model in memory    -> adapter, shard_model   } -> PeftModel in FSDP units -> SFTTrainer
    sharded model      -> adapter, its own units/

Saving, resuming and what may go wrong in between are `resuming/resumable.py`'s.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from . import compat
from .anatomy import decoder_layers
from .compat.accelerate_cpu_fsdp import PATCH as CPU_FSDP
from .compat.trl_head_gradient import PATCH as HEAD_GRADIENT
from .compat.trl_head_positions import PATCH as HEAD_POSITIONS
from .compat.trl_head_positions import counted_labels
from .config import QLoRAFSDPConfig
from .export import check_exportable, save_adapter
from .inputs import (
    adopt_args,
    announce_default_adapter,
    check_datasets,
    check_model,
    leave_experts_to_us,
    load_processing_class,
    read_model_options,
    read_policy,
    settle_liger,
)
from .loader import load_quantized_model
from .loading.adapters import initialize_adapter, inject_adapter
from .mesh import make_mesh, mesh_device
from .planning.auto import apply_plan
from .ranks import log_once, rank
from .resuming.resumable import ResumableTrainer
from .sharding import (
    base_model,
    check_sharded,
    is_sharded,
    shard_adapters,
    shard_again,
    shard_model,
    shard_root,
)
from .speed.checkpointing import LayerCheckpointing
from .speed.deferred_metrics import DeferredMetrics
from .speed.frozen_objects import frozen_objects
from .speed.fused_norms import fuse_norms
from .speed.fusion import fuse_lora
from .speed.kept_gathered import KeptGathered
from .speed.loss_filter import LossFilter
from .speed.module_walks import spare_walks
from .speed.packed_attention import use_packed_attention
from .speed.shard_steps import clip_gradients, step_on_shards
from .speed.spared_states import SparedRandomStates
from .summary import describe


class QLoRAFSDPTrainer(ResumableTrainer):
    """Fine-tune a causal LM with LoRA on 4-bit weights that FSDP2 shards across all ranks.

    Takes every argument of [`~trl.SFTTrainer`]. Launch with `torchrun --nproc_per_node N script.py`.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): Hub id or folder: no rank ever holds the model. A model that
            is already in memory in 4 bits, with or without adapter, is sharded in place.
        args (`QLoRAFSDPConfig`, `SFTConfig` or `TrainingArguments`, *optional*): A plain config is translated.
        quantization_config (`BitsAndBytesConfig`, *optional*): 4-bit type and double quantisation; overrides the
            fields of `args`. Storage and compute dtype follow the parameter dtype.
        peft_config (`LoraConfig`, *optional*): What to train. Defaults to r=16, alpha=32, all linear layers.
        *others, **named: As in `SFTTrainer`.
    Raises:
        ValueError: The arguments cannot work. Says so before anything large is read.
    """

    _tag_names = ["trl", "sft", "qlora", "fsdp"]  # noqa: RUF012, upstream's attribute

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *others: Any,
        **named: Any,
    ) -> None:
        given = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *others, **named).arguments
        del given["self"]
        check_model(model, given.get("peft_config"))
        args = given["args"] = adopt_args(args, model)
        check_datasets(given.get("train_dataset"), given.get("eval_dataset"), args, given.get("formatting_func"))
        if args.use_cpu:
            compat.apply(CPU_FSDP)
        if args.auto_plan:
            apply_plan(args, model, given.get("peft_config"), given.get("quantization_config"))
        args.reset_accelerator_state()
        self.sharding_policy = read_policy(args)
        quantization = given.pop("quantization_config", None)
        peft_config = given.pop("peft_config", None)
        # Adapters are drawn at random, and the data order comes later: the seed is set where TRL sets it.
        set_seed(args.seed)
        given["processing_class"] = given.get("processing_class") or load_processing_class(model, args)
        given["model"] = self._resolve_model(model, args, quantization, peft_config)
        leave_experts_to_us(given["model"], args)
        check_exportable(given["model"])
        _complete_heads(given["model"])
        with _hidden_from_trl(given["model"], args):
            super().__init__(**given)
        check_sharded(self.model, self.sharding_policy)
        num_mlps, num_norms = (fuse_lora(self.model).num_mlps, fuse_norms(self.model)) if args.fuse_lora else (0, 0)
        settle_liger(args, num_mlps, num_norms, self.accelerator.device.type)
        if self.padding_free:
            use_packed_attention(base_model(self.model))
        compat.apply_or_say(HEAD_GRADIENT)
        if self.accelerator.device.type == "cuda":
            compat.apply_or_say(HEAD_POSITIONS)
        self.deferred_metrics, self.loss_filter = DeferredMetrics(self), LossFilter(self)
        self.checkpointing: LayerCheckpointing | None = None
        names = self.sharding_policy.class_names
        if args.checkpoint_layers is not None:
            base, device = base_model(self.model), self.accelerator.device
            self.checkpointing = LayerCheckpointing(self.model, base, args.checkpoint_layers, device, names)
            self.add_callback(self.checkpointing)
        self.add_callback(SparedRandomStates())
        self.kept_gathered = KeptGathered(self._kept_modules())
        self.trained = spare_walks(self.model, list(decoder_layers(base_model(self.model), names).values()))
        self._num_parameters = 0
        # What scripts call at their end, on the model instead of the trainer.
        self.model.save_pretrained = functools.partial(_save_pretrained, self.model)
        self.model.merge_and_unload = _refuse_merging
        # accelerate prepares a model only together with an optimizer, and this one needs no preparing.
        self.accelerator._models.append(self.model)
        self._report()

    # -- the model ---------------------------------------------------------------------------------------------------

    def _resolve_model(
        self, model: Any, args: QLoRAFSDPConfig, quantization: BitsAndBytesConfig | None, peft_config: Any
    ) -> nn.Module:
        """Return the model as a `PeftModel` in FSDP units, whatever was given."""
        if not isinstance(model, PeftModel):
            peft_config = peft_config or announce_default_adapter()
        if isinstance(model, str):
            options = read_model_options(args, quantization)
            return load_quantized_model(model, peft_config=peft_config, policy=self.sharding_policy, **options)
        if quantization is not None or args.model_init_kwargs:
            log_once(
                "quantization_config and model_init_kwargs have no effect: the model was loaded by the script. Pass "
                "its name or folder as model to load it here."
            )
        if not is_sharded(model):
            if not isinstance(model, PeftModel):
                model = inject_adapter(model, peft_config)
            return shard_model(model, self.sharding_policy)
        return self._add_adapter(model, peft_config)

    def _add_adapter(self, model: Any, peft_config: Any) -> nn.Module:
        """Give an adapter to a model that is sharded without one: its layers become units of their own."""
        policy, mesh = self.sharding_policy, make_mesh()
        if not isinstance(model, PeftModel):
            if peft_config.use_dora or peft_config.modules_to_save:
                given = "use_dora=True" if peft_config.use_dora else "modules_to_save"
                raise ValueError(
                    f"peft_config has {given}, which starts from whole weights, but the model is sharded already. Give "
                    "peft_config to load_quantized_model, or pass the model's name or folder."
                )
            log_once(
                "The model was sharded without an adapter, so each layer's LoRA weights become a unit of their own, "
                "gathered separately. Give peft_config to load_quantized_model to have them in the layer's unit."
            )
            model = inject_adapter(model, peft_config)
            initialize_adapter(model, peft_config, mesh_device(mesh))
            base = base_model(model)
            for unit in policy.plan_units(base):
                shard_adapters([base.get_submodule(name) for name in unit.modules], policy, mesh)
        if not isinstance(model, FSDPModule):
            shard_root(model, policy, mesh, set())
        return model

    def _kept_modules(self) -> list[nn.Module]:
        """Return the modules of the units that stay gathered from forward to backward."""
        if not self.sharding_policy.reshard_after_forward:
            return list(self.model.modules())
        base = base_model(self.model)
        replicated = [unit for unit in self.sharding_policy.plan_units(base) if unit.is_replicated]
        return [base.get_submodule(unit.modules[0]) for unit in replicated]

    def _report(self) -> None:
        if rank() == 0:
            policy = self.sharding_policy
            units = policy.plan_units(base_model(self.model))
            offload = policy.describe_offload(self.accelerator.device.type)
            print(describe(self.model, units, policy.param_dtype, offload, compat.active_patches()), flush=True)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with frozen_objects(), self.loss_filter.at_work():
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.kept_gathered.begin(is_last=self.accelerator.sync_gradients)
        if self.checkpointing is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.checkpointing.run(self, super().training_step, inputs, num_items_in_batch)
        return self.loss_filter.filter(loss)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Where a script takes steps by itself, nobody settles. A loss function of the user's may gather numbers of its
        # own, and look at them on one rank alone.
        if self.is_in_train and self.model.training and self.compute_loss_func is None:
            with self.deferred_metrics.deferring(), counted_labels(inputs.get("labels")):
                return super().compute_loss(model, inputs, *args, **kwargs)
        self.deferred_metrics.settle()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.deferred_metrics.settle()  # of batches without a step: an epoch ended after them
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        shard_again(self.model)  # or after an evaluation the optimizer is given what is gathered, and trains nothing
        optimizer = super().create_optimizer(*args, **kwargs)
        step_on_shards(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if model is not self.model:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_gradients(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and model is self.model:  # max_grad_norm=0: it is measured, and nothing is clipped
            self.accelerator.unscale_gradients()
            grad_norm = clip_gradients(self.trained, math.inf)
        self.deferred_metrics.settle()  # here, since the norm is read next: the device is waited for anyway
        return super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        self.loss_filter.restore()  # what upstream does next after adding up a loss
        if "input_ids" not in inputs or not hasattr(self.model, "num_parameters"):
            return super().floating_point_ops(inputs)
        if not self._num_parameters:
            self._num_parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    # -- accelerate --------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # On this instance: the model is sharded, so its optimizer needs no parameters swapped and nothing is wrapped.
        self.accelerator._prepare_fsdp2 = functools.partial(_prepare_sharded, self.accelerator)


@contextlib.contextmanager
def _hidden_from_trl(model: nn.Module, args: QLoRAFSDPConfig) -> Iterator[None]:
    """Hide, while `SFTTrainer.__init__` runs, what would make it undo what is done.

    It casts the trainable weights of models marked `is_loaded_in_4bit` to bfloat16 (trl sft_trainer.py, "When using
    QLoRA"), and warns that `model_init_kwargs`, long used, will be ignored.
    """
    base: Any = base_model(model)
    options = args.model_init_kwargs
    marked = getattr(base, "is_loaded_in_4bit", False)
    base.is_loaded_in_4bit, args.model_init_kwargs = False, None
    try:
        yield
    finally:
        base.is_loaded_in_4bit, args.model_init_kwargs = marked, options


def _complete_heads(model: nn.Module) -> None:
    """Let TRL, which multiplies by the head itself, read the `bias` of a head whose rows are trained.

    PEFT's wrapper, which a tied head gets as well, passes on the weight alone (peft 0.21, trl 1.16).
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and not hasattr(module, "bias"):
            module.register_parameter("bias", getattr(module.original_module, "bias", None))


def _save_pretrained(model: PeftModel, save_directory: str, **options: Any) -> None:
    """Save the adapter as the trainer does. A collective, as everything that reads a sharded model."""
    if options:
        log_once("save_pretrained: %s has no effect on a sharded model.", ", ".join(sorted(options)))
    save_adapter(model, save_directory)


def _refuse_merging(*_: Any, **__: Any) -> None:
    raise ValueError(
        "merge_and_unload() needs the whole model, which no rank holds. Save the adapter, and merge it with "
        "`hf-qlora-fsdp merge BASE ADAPTER OUT`, which streams."
    )


def _prepare_sharded(accelerator: Any, *objects: Any) -> tuple[Any, ...]:
    """Do what `Accelerator._prepare_fsdp2` does, less the sharding: prepare optimizers first, schedulers second."""
    prepared = [
        value if isinstance(value, nn.Module) else accelerator._prepare_one(value, first_pass=True) for value in objects
    ]
    prepared = [value if isinstance(value, nn.Module) else accelerator._prepare_one(value) for value in prepared]
    new = (value for value in prepared if isinstance(value, nn.Module) and value not in accelerator._models)
    accelerator._models.extend(new)
    return tuple(prepared)

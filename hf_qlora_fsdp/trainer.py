"""`SFTTrainer`, with a model that fits on none of the cards.

Everything is settled **before** `SFTTrainer.__init__` runs: the arguments are translated, the dataset looked at, the
model loaded in 4 bits, fitted with its adapter and sharded. What reaches TRL is a `PeftModel` that is already an
`FSDPModule`, so TRL has nothing to load and accelerate nothing to wrap; batches, losses, logging, evaluation and the
training loop are theirs, unchanged.

    model id or folder -> load_quantized_model  \\
    model in memory    -> adapter, shard_model   } -> PeftModel in FSDP units -> SFTTrainer
    sharded model      -> adapter, its own units/

What is overridden is what upstream does wrong with such a model: it would gather the whole base at every save, write
an empty adapter when names carry a wrapper's prefix, and cast the float32 masters to bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedModel, TrainingArguments, set_seed
from trl import SFTTrainer

from . import compat
from .adapters import check_peft_config, default_peft_config, initialize_adapter, inject_adapter
from .anatomy import plan_units
from .compat.accelerate_cpu_fsdp import PATCH as CPU_FSDP
from .config import QLoRAFSDPConfig
from .export import check_exportable, load_adapter, load_optimizer, save_adapter, save_optimizer, synchronize
from .loader import load_quantized_model
from .ranks import log_once, rank
from .sharding import (
    ShardingPolicy,
    base_model,
    check_sharded,
    check_storage_dtype,
    is_sharded,
    make_mesh,
    mesh_device,
    shard_adapters,
    shard_model,
    shard_root,
)
from .summary import describe
from .units import format_dtype

_TEXT_COLUMNS = ("input_ids", "messages", "prompt", "image", "images")
_SCHEDULER_FILE = "scheduler.pt"
_ARGUMENTS_FILE = "training_args.bin"


class QLoRAFSDPTrainer(SFTTrainer):
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
        _check_model(model, given.get("peft_config"))
        args = given["args"] = _adopt_args(args, model)
        check_datasets(given.get("train_dataset"), given.get("eval_dataset"), args, given.get("formatting_func"))
        if args.use_cpu:
            compat.apply(CPU_FSDP)
        args.reset_accelerator_state()
        self.sharding_policy = _sharding_policy(args)
        quantization = given.pop("quantization_config", None)
        peft_config = given.pop("peft_config", None)
        # Adapters are drawn at random, and the data order comes later: the seed is set where TRL sets it.
        set_seed(args.seed)
        given["processing_class"] = given.get("processing_class") or _load_processing_class(model, args)
        given["model"] = self._resolve_model(model, args, quantization, peft_config)
        check_exportable(given["model"])
        with _hidden_from_trl(given["model"], args):
            super().__init__(**given)
        check_sharded(self.model, self.sharding_policy)
        register_fsdp_forward_method(self.model, "generate")
        # accelerate prepares a model only together with an optimizer, and this one needs no preparing.
        self.accelerator._models.append(self.model)
        self._report()

    # -- the model ---------------------------------------------------------------------------------------------------

    def _resolve_model(
        self, model: Any, args: QLoRAFSDPConfig, quantization: BitsAndBytesConfig | None, peft_config: Any
    ) -> nn.Module:
        """Return the model as a `PeftModel` in FSDP units, whatever was given."""
        if not isinstance(model, PeftModel):
            peft_config = peft_config or _announced_default()
        if isinstance(model, str):
            options = _model_options(args, quantization)
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

    def _add_adapter(self, model: nn.Module, peft_config: Any) -> nn.Module:
        """Give an adapter to a model that is sharded without one: its layers become units of their own."""
        policy, mesh = self.sharding_policy, make_mesh()
        if not isinstance(model, PeftModel):
            log_once(
                "The model was sharded without an adapter, so each layer's LoRA weights become a unit of their own, "
                "gathered separately. Give peft_config to load_quantized_model to have them in the layer's unit."
            )
            model = inject_adapter(model, peft_config)
            initialize_adapter(model, peft_config, mesh_device(mesh))
            base = base_model(model)
            for unit in plan_units(base, policy.class_names):
                shard_adapters([base.get_submodule(name) for name in unit.modules], policy, mesh)
        if not isinstance(model, FSDPModule):
            shard_root(model, policy, mesh, set())
        return model

    def _report(self) -> None:
        if rank() == 0:
            policy = self.sharding_policy
            offload = "none"
            if policy.cpu_offload:
                pinned = "pinned" if policy.cpu_offload_pin_memory else "pageable"
                offload = f"frozen weights in {pinned} host memory, adapter on the accelerator"
            units = plan_units(base_model(self.model), policy.class_names)
            print(describe(self.model, units, policy.param_dtype, offload, compat.active_patches()), flush=True)

    # -- accelerate --------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # On this instance: the model is sharded, so its optimizer needs no parameters swapped and nothing is wrapped.
        self.accelerator._prepare_fsdp2 = functools.partial(_prepare_sharded, self.accelerator)

    # -- saving and resuming -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as plain PEFT files, and the tokenizer. All ranks must call it; rank 0 writes."""
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
        save_adapter(self.model, output_dir)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, _ARGUMENTS_FILE))
        synchronize()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self.optimizer.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER_FILE))
        synchronize()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(model or self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.args.save_only_model or not os.path.isfile(os.path.join(checkpoint, _SCHEDULER_FILE)):
            log_once("%s holds no optimizer states: training goes on with fresh ones.", checkpoint)
            return
        load_optimizer(self.model, self.optimizer.optimizer, checkpoint)
        state = torch.load(os.path.join(checkpoint, _SCHEDULER_FILE), weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        log_once("Loading the best adapter, from %s.", self.state.best_model_checkpoint)
        load_adapter(self.model, self.state.best_model_checkpoint)


def check_datasets(train_dataset: Any, eval_dataset: Any, args: QLoRAFSDPConfig, formatting_func: Any = None) -> None:
    """Refuse datasets that hold nothing to train on, before the model is loaded.

    Raises:
        ValueError: One is missing, empty, or has none of the columns that SFT reads.
    """
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        named["eval_dataset"] = eval_dataset
    for name, dataset in named.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ValueError(
                f"{name} is a {type(dataset).__name__}, and only a datasets.Dataset or IterableDataset can be trained "
                "on. Load it with datasets.load_dataset, or build it with Dataset.from_list."
            )
        if formatting_func is None and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            _check_columns(name, dataset, args.dataset_text_field)


def _check_columns(name: str, dataset: Dataset | IterableDataset, text_field: str) -> None:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{name} has no rows, so there is nothing to train on. Check how it was filtered.")
    usable = {text_field, *_TEXT_COLUMNS} & set(row)
    if not usable or (usable == {"prompt"} and "completion" not in row):
        raise ValueError(
            f"{name} has the columns {sorted(row)}, of which SFT reads none. It needs 'messages', 'prompt' and "
            f"'completion', 'input_ids', or text in the column that dataset_text_field names (now {text_field!r}); or "
            "pass formatting_func."
        )


def _adopt_args(args: TrainingArguments | None, model: Any) -> QLoRAFSDPConfig:
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path or type(model).__name__
        args = QLoRAFSDPConfig(f"{os.path.basename(str(name).rstrip('/'))}-SFT")
    if not isinstance(args, QLoRAFSDPConfig):
        args = QLoRAFSDPConfig.from_training_args(args)
    template = args.chat_template_path
    if template and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"chat_template_path={template!r} is not a .jinja file, so TRL would clone the template of a model of that "
            "name and resize the embedding, which is sharded by then. Save the template as a .jinja file and pass its "
            "path."
        )
    return args


def _sharding_policy(args: QLoRAFSDPConfig) -> ShardingPolicy:
    classes = args.transformer_layer_cls_to_wrap
    return ShardingPolicy(
        param_dtype=args.compute_dtype,
        reshard_after_forward=args.reshard_after_forward,
        cpu_offload=args.cpu_offload,
        cpu_offload_pin_memory=args.cpu_offload_pin_memory,
        transformer_layer_cls_to_wrap=tuple(classes) if classes else None,
    )


def _load_processing_class(model: Any, args: QLoRAFSDPConfig) -> Any:
    """Load the tokenizer of the same revision as the model; TRL would take the newest once it is given a module."""
    options = args.model_init_kwargs or {}
    hub = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    name = model if isinstance(model, str) else base_model(model).config.name_or_path
    if not name:
        raise ValueError(
            f"The {type(base_model(model)).__name__} passed as model does not know its name, so its tokenizer cannot "
            "be found. Pass processing_class."
        )
    return AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code, **hub)


def _model_options(args: QLoRAFSDPConfig, quantization: BitsAndBytesConfig | None) -> dict[str, Any]:
    """Read `model_init_kwargs` for what they mean to `load_quantized_model`."""
    options = dict(args.model_init_kwargs or {})
    inner = options.pop("quantization_config", None)
    if inner is not None and quantization is not None:
        raise ValueError(
            "quantization_config was given to the trainer and in model_init_kwargs, and only one can hold. Keep one."
        )
    if options.get("device_map") is not None:
        raise ValueError(
            f"device_map={options['device_map']!r} places whole layers, while FSDP spreads every layer over all ranks. "
            "Leave it out."
        )
    options.pop("device_map", None)
    for name in ("low_cpu_mem_usage", "use_safetensors", "load_in_4bit"):
        if options.pop(name, None) is False:
            raise ValueError(f"{name}=False, but models are always loaded that way here. Leave it out.")
    if options.pop("load_in_8bit", False):
        raise ValueError("load_in_8bit=True, but only 4-bit weights are sharded and trained here. Leave it out.")
    dtype = options.pop("dtype", options.pop("torch_dtype", None))
    if dtype not in (None, "auto"):
        check_same_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype, args.compute_dtype)
    options.setdefault("trust_remote_code", args.trust_remote_code)
    options["quantization_config"] = quantization or inner or args.quantization_config()
    check_storage_dtype(options["quantization_config"].bnb_4bit_quant_storage, args.compute_dtype)
    return options


def check_same_dtype(dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """Refuse a dtype for the frozen weights that is not the parameter dtype.

    Float32 is what `trl.ModelConfig` fills in where nobody asked for anything; it costs a line, not the run.

    Raises:
        ValueError: Both differ.
    """
    if dtype == torch.float32 != param_dtype:
        log_once(
            "model_init_kwargs has dtype=float32, which has no effect: frozen weights are kept in %s, the dtype of the "
            "computation.",
            format_dtype(param_dtype),
        )
    elif dtype != param_dtype:
        raise ValueError(
            f"model_init_kwargs has dtype={format_dtype(dtype)} while training computes in "
            f"{format_dtype(param_dtype)}: FSDP would cast every weight at every step. Leave dtype out, or set "
            "param_dtype to it."
        )


def _check_model(model: Any, peft_config: Any) -> None:
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "model is a PeftModel and peft_config was given too, so there would be two adapters. Pass one of them."
        )
    if peft_config is not None:
        check_peft_config(peft_config)
    if isinstance(model, str):
        return
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, which is neither a name nor a model. Pass the Hub id or the folder as "
            "a string."
        )
    base = base_model(model)
    if not getattr(base, "is_loaded_in_4bit", False):
        kind = "in 8 bits" if getattr(base, "is_loaded_in_8bit", False) else "not quantised"
        raise ValueError(
            f"The {type(base).__name__} passed as model is {kind}, and only LoRA on 4-bit weights is trained here. "
            "Pass its name or folder as model, which is quantised while it is read, or load it with "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)."
        )


def _announced_default() -> Any:
    config = default_peft_config()
    log_once(
        "No peft_config given: training LoRA with r=%d, alpha=%d on all linear layers.", config.r, config.lora_alpha
    )
    return config


@contextlib.contextmanager
def _hidden_from_trl(model: nn.Module, args: QLoRAFSDPConfig) -> Iterator[None]:
    """Hide, while `SFTTrainer.__init__` runs, what would make it undo what is done.

    It casts the trainable weights of models marked `is_loaded_in_4bit` to bfloat16 (trl sft_trainer.py, "When using
    QLoRA"), and warns that `model_init_kwargs`, long used, will be ignored.
    """
    base, options = base_model(model), args.model_init_kwargs
    base.is_loaded_in_4bit, args.model_init_kwargs = False, None
    try:
        yield
    finally:
        base.is_loaded_in_4bit, args.model_init_kwargs = True, options


def _prepare_sharded(accelerator: Any, *objects: Any) -> tuple[Any, ...]:
    """Do what `Accelerator._prepare_fsdp2` does, less the sharding: prepare optimizers first, schedulers second."""
    prepared = [
        value if isinstance(value, nn.Module) else accelerator._prepare_one(value, first_pass=True) for value in objects
    ]
    prepared = [value if isinstance(value, nn.Module) else accelerator._prepare_one(value) for value in prepared]
    accelerator._models.extend(value for value in prepared if isinstance(value, nn.Module))
    return tuple(prepared)

"""What a script hands to the trainer, read for what it means here, and refused where it cannot work.

All of it happens before a tokenizer or a weight is read: whoever passes the wrong thing learns it in a second, not
after a quarter of an hour of loading, and learns what to write instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoProcessor, BitsAndBytesConfig, TrainingArguments
from transformers.utils import is_liger_kernel_available

from .config import QLoRAFSDPConfig
from .experts.layers import Experts4bit
from .loading.adapters import check_peft_config, default_peft_config
from .ranks import log_once
from .sharding import base_model, check_in_4_bits, check_storage_dtype
from .sharding_policy import ShardingPolicy
from .units import format_dtype, parse_bytes

_TEXT_COLUMNS = ("input_ids", "messages", "prompt", "image", "images")


def check_datasets(train_dataset: Any, eval_dataset: Any, args: QLoRAFSDPConfig, formatting_func: Any = None) -> None:
    """Refuse datasets that hold nothing to train on, before the model is loaded.

    Raises:
        ValueError: One is missing, empty, or has none of the columns that SFT reads.
    """
    preparation: Any = args.dataset_kwargs or {}
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
        if formatting_func is None and not preparation.get("skip_prepare_dataset"):
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


def adopt_args(args: TrainingArguments | None, model: Any) -> QLoRAFSDPConfig:
    """Return the arguments as ours, whatever class they have. Without any: the defaults, and the model's name.

    Raises:
        ValueError: They ask for something that cannot work here.
    """
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


def read_policy(args: QLoRAFSDPConfig) -> ShardingPolicy:
    """Return what the arguments say about sharding."""
    classes = args.transformer_layer_cls_to_wrap
    return ShardingPolicy(
        param_dtype=args.compute_dtype,
        reshard_after_forward=args.reshard_after_forward,
        cpu_offload=args.cpu_offload,
        cpu_offload_pin_memory=args.cpu_offload_pin_memory,
        cpu_offload_layers=args.cpu_offload_layers,
        cpu_offload_dir=Path(args.cpu_offload_dir) if args.cpu_offload_dir else None,
        cpu_offload_keep_files=args.cpu_offload_keep_files,
        cpu_offload_trainable=args.cpu_offload_trainable,
        replicate_layers=args.replicate_layers,
        transformer_layer_cls_to_wrap=tuple(classes) if classes else None,
    )


def load_processing_class(model: Any, args: QLoRAFSDPConfig) -> Any:
    """Load the tokenizer of the same revision as the model; TRL would take the newest once it is given a module."""
    name = model if isinstance(model, str) else base_model(model).config.name_or_path
    if not name:
        raise ValueError(
            f"The {type(base_model(model)).__name__} passed as model does not know its name, so its tokenizer cannot "
            "be found. Pass processing_class."
        )
    return AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code, **args.hub_options())


def read_model_options(args: QLoRAFSDPConfig, quantization: BitsAndBytesConfig | None) -> dict[str, Any]:
    """Read `model_init_kwargs` for what they mean to `load_quantized_model`."""
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a dict by now
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
        check_same_dtype(_parse_dtype(dtype), args.compute_dtype)
    options.setdefault("trust_remote_code", args.trust_remote_code)
    options = {"shard_cache": args.shard_cache, "shard_cache_dir": args.shard_cache_dir} | options
    if args.expert_chunk:
        options.setdefault("expert_chunk_bytes", parse_bytes(args.expert_chunk))
    options["quantization_config"] = _settle_quantization(quantization or inner, args)
    return options


def _parse_dtype(dtype: Any) -> torch.dtype:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype):
        raise ValueError(
            f"model_init_kwargs has dtype={dtype!r}, which torch does not know. Write 'bfloat16', 'float16' or "
            "'float32', or leave it out."
        )
    return parsed


def _settle_quantization(given: Any, args: QLoRAFSDPConfig) -> BitsAndBytesConfig:
    """Return the quantisation that was asked for: as an object or a dict, or by the fields of `args`."""
    if given is None:
        return args.quantization_config()
    if isinstance(given, dict):
        given = BitsAndBytesConfig.from_dict(dict(given))
    if isinstance(given, BitsAndBytesConfig) and given.load_in_4bit:
        check_storage_dtype(given.bnb_4bit_quant_storage, args.compute_dtype)
        if given.bnb_4bit_quant_type != args.bnb_4bit_quant_type:
            log_once(
                "quantization_config says %s and wins over bnb_4bit_quant_type=%r of the arguments.",
                given.bnb_4bit_quant_type,
                args.bnb_4bit_quant_type,
            )
    return given  # what else it may be, `blueprint.settle_quantization` refuses by name


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


def check_model(model: Any, peft_config: Any) -> None:
    """Refuse a model, or an adapter for it, that cannot be trained here.

    Raises:
        ValueError: It is no model, not in 4 bits, or would get two adapters or one that cannot be initialised.
    """
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
    check_in_4_bits(base, getattr(base, "is_loaded_in_4bit", False))


def leave_experts_to_us(model: nn.Module, args: QLoRAFSDPConfig) -> None:
    """Leave Liger's SwiGLU out where experts are in 4 bits: it would multiply by weights that are not there.

    What else Liger replaces in such models, norms and rotary embeddings, works as in any other (liger-kernel 0.8.5).

    Args:
        model (`nn.Module`): The model that is about to be trained.
        args (`QLoRAFSDPConfig`): Gets another `liger_kernel_config`.
    """
    options: dict[str, Any] = dict(args.liger_kernel_config or {})
    if args.use_liger_kernel and any(isinstance(module, Experts4bit) for module in model.modules()):
        if options.get("swiglu", True):
            log_once("use_liger_kernel: all but its SwiGLU, which knows no experts in 4 bits.")
        args.liger_kernel_config = options | {"swiglu": False}


def settle_liger(args: QLoRAFSDPConfig, num_fused_mlps: int, num_fused_norms: int, device_type: str) -> None:
    """Keep Liger, which works when training begins, from what is fused already; say on a GPU if it is not used.

    Args:
        args (`QLoRAFSDPConfig`): May get another `liger_kernel_config`.
        num_fused_mlps (`int`): MLPs whose `forward` Liger's SwiGLU would replace by one that runs their layers one by
            one.
        num_fused_norms (`int`): Norms whose `forward` it would replace likewise.
        device_type (`str`): Of the device that trains.
    """
    options: dict[str, Any] = dict(args.liger_kernel_config or {})
    if args.use_liger_kernel and num_fused_mlps and options.get("swiglu", True):
        log_once("use_liger_kernel: all but its SwiGLU, in whose place the MLPs are fused with their adapters.")
        options["swiglu"] = False
    if args.use_liger_kernel and num_fused_norms and options.get("rms_norm", True):
        log_once("use_liger_kernel: all but its RMSNorm, in whose place is one that makes no gradient of its weight.")
        options["rms_norm"] = False
    if options != (args.liger_kernel_config or {}):
        args.liger_kernel_config = options
    if not args.use_liger_kernel and device_type == "cuda":
        what = "Rotary embedding runs" if num_fused_norms else "RMSNorm and rotary embedding run"
        log_once(
            "%s in many kernels, as in transformers, since %s.",
            what,
            "use_liger_kernel=True is not set" if is_liger_kernel_available() else "liger-kernel is not installed",
        )


def announce_default_adapter() -> LoraConfig:
    """Return what is trained when nothing was said, and say so."""
    config = default_peft_config()
    log_once(
        "No peft_config given: training LoRA with r=%d, alpha=%d on all linear layers.", config.r, config.lora_alpha
    )
    return config

"""The model before its weights: every module in its place, with shapes, dtypes and no memory.

What `from_pretrained` decides before it reads a weight is decided here, by upstream's own functions: which config,
which linear layers become 4-bit ones, which parts stay in 16 or 32 bits. The 4-bit layers are then exchanged for
packed ones (`packing.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..anatomy import build_meta_model
from ..experts.layers import Experts4bit, fused_experts, linear_routers
from ..packed_linear import repack
from ..ranks import log_once
from ..sharding import check_storage_dtype, float32_parameters
from ..units import format_dtype
from .weights import find_weights


def build_quantized_meta_model(
    model_id_or_path: str,
    quantization_config: BitsAndBytesConfig | None,
    param_dtype: torch.dtype,
    *,
    hub: dict[str, Any],
    trust_remote_code: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """Build a causal LM on the meta device, with packed 4-bit layers where its weights will be quantised.

    Args:
        model_id_or_path (`str`): Hub id or folder; only its `config.json` is read.
        quantization_config (`BitsAndBytesConfig`, *optional*): As asked for, see `settle_quantization`.
        param_dtype (`torch.dtype`): Dtype of everything else, of the computation, and of the storage.
        hub (`dict`): `revision`, `token` and the like, as `from_pretrained` takes them.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        **overrides: `attn_implementation`, and values that override the config's.
    Raises:
        ValueError: There is no such model, or it cannot be held in 4 bits.
    """
    build_options = {
        name: overrides.pop(name) for name in ("attn_implementation", "experts_implementation") if name in overrides
    }
    try:
        config, unknown = AutoConfig.from_pretrained(
            model_id_or_path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **hub, **overrides
        )
    except (OSError, ValueError):
        find_weights(model_id_or_path, **hub)  # says what is there instead of a model, e.g. an adapter
        raise
    if unknown:
        raise ValueError(
            f"{sorted(unknown)} is neither an option of load_quantized_model nor a value of {type(config).__name__}. "
            "It would have no effect. Leave it out or correct its name."
        )
    stored = getattr(config, "quantization_config", None)
    quantization = settle_quantization(stored, quantization_config, param_dtype)
    model: Any = build_meta_model(config, param_dtype, trust_remote_code=trust_remote_code, **build_options)
    model.config.name_or_path = model_id_or_path
    model.config.quantization_config = quantization
    quantizer = pack_linear_layers(model, quantization, stored is not None, param_dtype, param_dtype)
    pack_expert_layers(model, quantization, quantizer.modules_to_not_convert, param_dtype, param_dtype)
    for parameter in float32_parameters(model, param_dtype):
        parameter.data = parameter.data.float()
    model.requires_grad_(False)
    model.hf_quantizer = quantizer
    model.is_loaded_in_4bit = True
    return model


def pack_linear_layers(
    model: PreTrainedModel,
    quantization: BitsAndBytesConfig,
    pre_quantized: bool,
    compute_dtype: torch.dtype,
    storage_dtype: torch.dtype,
) -> Any:
    """Put packed 4-bit layers, in place, where upstream would put those of bitsandbytes.

    Routers stay in 16 bits. Where one is a linear layer, upstream would take it for one of the others.

    Args:
        model (`PreTrainedModel`): The model, on the meta device.
        quantization (`BitsAndBytesConfig`): How its weights are or will be quantised.
        pre_quantized (`bool`): Whether they are stored so.
        compute_dtype (`torch.dtype`): Dtype of the matrix products.
        storage_dtype (`torch.dtype`): Dtype that packed buffers are viewed in.
    Returns:
        Upstream's quantizer, which knows what was left alone.
    """
    routers = list(linear_routers(model, [name for name, _ in fused_experts(model)]))
    if routers and not pre_quantized:  # a stored one is in the bits that it is stored in
        skipped = quantization.llm_int8_skip_modules
        named = get_keys_to_not_convert(model) if skipped is None else skipped
        quantization.llm_int8_skip_modules = sorted({*named, *routers})
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=pre_quantized)
    quantizer.preprocess_model(model=model, device_map=None, dtype=compute_dtype)
    for name, module in list(model.named_modules()):
        if hasattr(module, "source_cls"):
            model.set_submodule(name, repack(module, compute_dtype=compute_dtype, storage_dtype=storage_dtype))
    return quantizer


def pack_expert_layers(
    model: PreTrainedModel,
    quantization: BitsAndBytesConfig,
    skipped: list[str],
    compute_dtype: torch.dtype,
    storage_dtype: torch.dtype,
) -> None:
    """Put packed experts, in place, where a model has fused ones, which upstream leaves in 16 bits.

    Args:
        model (`PreTrainedModel`): The model, on the meta device.
        quantization (`BitsAndBytesConfig`): How its weights are or will be quantised.
        skipped (`list[str]`): Modules that are left alone, by name.
        compute_dtype (`torch.dtype`): Dtype of the matrix products.
        storage_dtype (`torch.dtype`): Dtype that packed buffers are viewed in.
    Raises:
        ValueError: There are experts that cannot be held in 4 bits.
    """
    for name, module in list(fused_experts(model)):
        if should_convert_module(name, skipped):
            experts = Experts4bit(
                module,
                quant_type=quantization.bnb_4bit_quant_type,
                double_quant=quantization.bnb_4bit_use_double_quant,
                compute_dtype=compute_dtype,
                storage_dtype=storage_dtype,
            )
            model.set_submodule(name, experts)


def settle_quantization(stored: Any, given: BitsAndBytesConfig | None, param_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settle how the weights are quantised: as they are stored, else as asked, else NF4 with double quantisation.

    Args:
        stored (`dict` or config, *optional*): The checkpoint's own `quantization_config`.
        given (`BitsAndBytesConfig`, *optional*): What the user asks for.
        param_dtype (`torch.dtype`): What storage and compute dtype follow.
    Raises:
        ValueError: It is not 4-bit quantisation by bitsandbytes, or its storage dtype cannot be sharded.
    """
    if given is not None and (not isinstance(given, BitsAndBytesConfig) or not given.load_in_4bit):
        raise ValueError(
            f"quantization_config={type(given).__name__}"
            f"{'(load_in_8bit=True)' if getattr(given, 'load_in_8bit', False) else ''}: only 4-bit weights of "
            "bitsandbytes are sharded and trained here. Pass BitsAndBytesConfig(load_in_4bit=True)."
        )
    if given is not None:
        check_storage_dtype(given.bnb_4bit_quant_storage, param_dtype)
    if stored is not None:
        fields = stored if isinstance(stored, dict) else stored.to_dict()
        if not fields.get("load_in_4bit"):
            raise ValueError(
                f"The checkpoint is quantised by {fields.get('quant_method')!r}"
                f"{' to 8 bits' if fields.get('load_in_8bit') else ''}, and only 4-bit weights of bitsandbytes are "
                "sharded and trained here. Load the 16-bit checkpoint instead; it is quantised while it is read."
            )
        settled = BitsAndBytesConfig.from_dict(fields)
        if given is not None and _kind(given) != _kind(settled):
            log_once(
                "The checkpoint is already quantised, as %s: its own quantization_config is used, not %s.",
                _kind(settled),
                _kind(given),
            )
    else:
        settled = given or BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    settled = BitsAndBytesConfig.from_dict(settled.to_dict())
    if settled.bnb_4bit_compute_dtype not in (torch.float32, param_dtype):  # float32 is upstream's default
        log_once(
            "bnb_4bit_compute_dtype=%s has no effect: matrices are multiplied in %s, the parameter dtype.",
            format_dtype(settled.bnb_4bit_compute_dtype),
            format_dtype(param_dtype),
        )
    settled.bnb_4bit_compute_dtype = param_dtype
    settled.bnb_4bit_quant_storage = param_dtype
    return settled


def _kind(quantization: BitsAndBytesConfig) -> str:
    double = " with double quantisation" if quantization.bnb_4bit_use_double_quant else ""
    return f"{quantization.bnb_4bit_quant_type}{double}"

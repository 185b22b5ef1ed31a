"""What a model is made of: its decoder layers, its ends, and the units it is sharded in.

Everything here comes from the model's own description (`_no_split_modules`, its input and output embeddings, which
weights it ties), never from a list of names of models, so that a decoder published tomorrow works.

**Units.** A unit is what FSDP gathers and frees as one. Too small and the run drowns in tiny collectives, too large
and nothing is saved. The choice here:

* every decoder layer is a unit, the LoRA weights in it included;
* the embedding is a unit;
* the final norm and the LM head are one. TRL reads `lm_head.weight` without ever calling `lm_head`, so a unit of the
  head alone would never be gathered by its own hooks, and a trainable head would lose its gradient reduction. The
  norm runs right before and gathers both. This unit stays gathered from the end of the forward to the begin of the
  backward, which are neighbours;
* where the head is tied to the embedding, all three are one unit;
* what is left over belongs to the root.

Where cards have room, decoder layers may be left whole on every rank (`ShardingPolicy.replicate_layers`). A unit is
then what is trained in several of them: so little that to gather it layer by layer is mostly waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Unit:
    """Modules that FSDP gathers and frees together.

    Args:
        name (`str`): What to call it in messages.
        modules (`tuple[str, ...]`): Names of its modules within the model, in the order of their forward.
        keep_gathered (`bool`): Whether it stays gathered between forward and backward.
        is_decoder_layer (`bool`): Whether it is one of the layers that repeat.
        is_replicated (`bool`): Whether what is frozen in it is left whole on every rank.
    """

    name: str
    modules: tuple[str, ...]
    keep_gathered: bool = False
    is_decoder_layer: bool = False
    is_replicated: bool = False


_LARGE_NUMEL = 1 << 24


class _LargeZerosWithoutMemory(TorchFunctionMode):
    """Makes zeros that no buffer has as many of without memory at once.

    accelerate takes the memory of parameters away when they are registered. Most are made by `torch.empty`, of which no
    page has been touched by then, but Llama 4 makes its experts by `torch.zeros`: gigabytes a layer, for a minute.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and "device" not in kwargs:
            shape = args[0] if args and not isinstance(args[0], int) else kwargs.get("size", args)
            if math.prod(shape) >= _LARGE_NUMEL:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype, **kwargs: object) -> PreTrainedModel:
    """Build a causal LM whose parameters have shapes but no memory.

    Buffers are real: rotary frequencies are computed when the module is built, in float32, and are in no checkpoint.
    Parameters are not initialised, which would take half of the time and is of no use without memory.

    Args:
        config (`PretrainedConfig`): The model's config.
        dtype (`torch.dtype`): Dtype of the parameters.
        **kwargs: Passed on to `AutoModelForCausalLM.from_config`, e.g. `attn_implementation`, `trust_remote_code`.
    Raises:
        ValueError: It is no causal LM.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    try:
        with _LargeZerosWithoutMemory(), init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{type(config).__name__} is no causal language model for this transformers, which has none to build from "
            "it, and no other kind is trained here. Name a causal language model."
        ) from error
    model.tie_weights()
    return model


def decoder_layers(model: PreTrainedModel, class_names: list[str] | None = None) -> dict[str, nn.Module]:
    """Return the layers that become one unit each, by name.

    Args:
        model (`PreTrainedModel`): The model, on any device.
        class_names (`list[str]`, *optional*): Classes to look for. Defaults to what the model says must not be split.
    Raises:
        ValueError: A class is not in the model, or the model names none.
    """
    wanted = set(class_names or _unsplittable_classes(model))
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _class_name(module) in wanted and not any(name.startswith(f"{layer}.") for layer in found):
            found[name] = module
    missing = wanted - {_class_name(module) for module in found.values()}
    if not found or (class_names and missing):
        raise ValueError(
            f"transformer_layer_cls_to_wrap={sorted(missing or wanted)}, but {type(model).__name__} has no such "
            "module, so nothing would be sharded layer by layer. Classes that repeat in this model: "
            f"{sorted(_repeated_classes(model))}. Name one of them, or leave transformer_layer_cls_to_wrap out: it is "
            "found from the model."
        )
    return found


def plan_units(model: PreTrainedModel, class_names: list[str] | None = None) -> list[Unit]:
    """Cut a model into units, in the order of its forward.

    Args:
        model (`PreTrainedModel`): The model, on any device, without adapters or with them.
        class_names (`list[str]`, *optional*): See `decoder_layers`.
    """
    layers = decoder_layers(model, class_names)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = _final_norm(model, next(iter(layers)))
    first, last = names[id(embedding)], names.get(id(head))
    ends = [name for name in (norm, last) if name]
    units = [Unit(name, (name,), is_decoder_layer=True) for name in layers]
    if is_tied(model):
        return [Unit("embedding, norm and head", tuple(dict.fromkeys([first, *ends])), keep_gathered=True), *units]
    units.insert(0, Unit("embedding", (first,)))
    # Without a norm to gather it, the head is left to the root unit, which is gathered for the whole step.
    if norm:
        units.append(Unit("norm and head", tuple(ends), keep_gathered=True))
    return units


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the LM head shares a weight with the embedding, be it one that PEFT keeps beside a copy."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return len(ends) == 2 and bool(set(ends[0].parameters()) & set(ends[1].parameters()))


def keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the parts of parameter names that the model wants in float32 although it is loaded in `dtype`."""
    return list(model._get_dtype_plan(dtype))


def _unsplittable_classes(model: PreTrainedModel) -> list[str]:
    classes = list(getattr(model, "_no_split_modules", None) or [])
    return classes or sorted(_repeated_classes(model))


def _repeated_classes(model: nn.Module) -> set[str]:
    """Classes that fill a `ModuleList`, the outermost ones: what a decoder repeats."""
    classes: set[str] = set()
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not any(name.startswith(f"{outer}.") for outer in seen):
            seen.append(name)
            classes |= {_class_name(child) for child in module}
    return classes


def _class_name(module: nn.Module) -> str:
    """Return the class as the model's author wrote it: `fully_shard` puts an `FSDP...` subclass in its place."""
    from torch.distributed.fsdp import FSDPModule

    cls = type(module)
    return cls.__bases__[-1].__name__ if issubclass(cls, FSDPModule) else cls.__name__


def _final_norm(model: nn.Module, first_layer: str) -> str | None:
    """Return the norm that follows the decoder layers: the last one beside the list that holds them."""
    path = first_layer.split(".")
    parent_name = ".".join(path[:-2])
    parent = model.get_submodule(parent_name)
    norms = [name for name, child in parent.named_children() if "norm" in type(child).__name__.lower()]
    return ".".join(filter(None, (parent_name, norms[-1]))) if norms else None

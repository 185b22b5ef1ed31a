"""Not keeping the states of random generators for layers that ask them nothing.

A layer that is computed twice must draw the same random numbers twice, so gradient checkpointing keeps the states of
all generators before each layer's forward, and puts them back around its second one. Without dropout that is for
nothing: some hundred microseconds of Python a layer, which a GPU may have to wait for.

Whether a layer draws numbers cannot be seen from outside, so it is assumed of every one whose code is not that of the
libraries below, and of every model whose config or modules speak of dropout, noise or the like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_NAMES = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # of transformers 5.17, and of 5.23
_KNOWN = frozenset(
    {"abc", "bitsandbytes", "builtins", "hf_qlora_fsdp", "liger_kernel", "peft", "torch", "transformers", "typing"}
)
_WORDS = ("drop", "jitter", "noise", "random", "stochastic")


def spare_random_states(model: nn.Module, config: Any, args: Any) -> bool:
    """Let gradient checkpointing leave the random generators alone, if no layer asks them for anything.

    Args:
        model (`nn.Module`): The model, with its adapter.
        config (`PreTrainedConfig`): Its config.
        args (`TrainingArguments`): Whose options of `torch.utils.checkpoint.checkpoint` are completed. What they say
            already, they say still.
    Returns:
        `bool`: Whether it does.
    """
    given = getattr(args, _NAMES[0]) or {}
    if not args.gradient_checkpointing or "preserve_rng_state" in given or draws_random_numbers(model, config):
        return False
    for name in _NAMES:
        if hasattr(args, name):
            # Without options, transformers would have said the first by itself.
            setattr(args, name, {"use_reentrant": False, **given, "preserve_rng_state": False})
    return True


def draws_random_numbers(model: nn.Module, config: Any) -> bool:
    """Return whether a forward in training may draw random numbers."""
    return _speaks_of_chance(config.to_dict()) or any(map(_may_draw, model.modules()))


def _may_draw(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    roots = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    return isinstance(module, nn.RReLU) or not roots <= _KNOWN


def _speaks_of_chance(config: Mapping[Any, Any]) -> bool:
    for name, value in config.items():
        if isinstance(value, Mapping):
            if _speaks_of_chance(value):
                return True
        elif isinstance(value, (int, float)) and value > 0 and any(word in str(name).lower() for word in _WORDS):
            return True
    return False

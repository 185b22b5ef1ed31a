"""Not keeping the states of random generators for layers that ask them nothing.

A layer that is computed twice must draw the same random numbers twice, so gradient checkpointing keeps the states of
all generators before each layer's forward, and puts them back around its second one. Without dropout that is for
nothing: some hundred microseconds of Python a layer, which a GPU may have to wait for.

Whether a layer draws numbers cannot be seen from outside, so it is assumed of every one whose code is not that of the
libraries below, and of every model whose config or modules speak of dropout, noise or the like.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import TrainerCallback

_KNOWN = frozenset(
    {"abc", "bitsandbytes", "builtins", "hf_qlora_fsdp", "liger_kernel", "peft", "torch", "transformers", "typing"}
)
_WORDS = ("drop", "jitter", "noise", "random", "stochastic")


class SparedRandomStates(TrainerCallback):
    """Lets gradient checkpointing leave the random generators alone, if no layer asks them for anything."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spare_random_states(kwargs["model"])


def spare_random_states(model: Any) -> None:
    """Let layers that are computed twice not keep the states of generators, if nobody needs them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, its gradient checkpointing switched on. What its options
            say about the states, they say still.
    """
    if draws_random_numbers(model, model.config):
        return
    for module in model.modules():
        function: Any = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and "preserve_rng_state" not in function.keywords:
            module._gradient_checkpointing_func = functools.partial(function, preserve_rng_state=False)


def draws_random_numbers(model: nn.Module, config: Any) -> bool:
    """Return whether a forward in training may draw random numbers.

    Args:
        model (`nn.Module`): The model, with its adapter.
        config (`PreTrainedConfig`): Its config.
    """
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
        elif any(word in str(name).lower() for word in _WORDS) and _is_positive(value):
            return True
    return False


def _is_positive(value: Any) -> bool:
    """Return whether a number is, or one of a list: a rate for each layer."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_positive, value))
    return isinstance(value, (int, float)) and value > 0

"""Which norms run as one function, see `kernels/rms_norm.py`, and which as transformers has them.

A norm is looked at for what it computes, not for its name: its `forward` has to be, instruction for instruction, that
of `LlamaRMSNorm`, as it is in 134 models of transformers, and its weight must not be trained. Where a call is not
a usual one, the class's own `forward` runs; if that is for its dtype, which nobody chose, one line says so.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..kernels.rms_norm import apply_rms_norm
from ..ranks import log_once
from ..units import format_dtype


class FusedNorm:
    """The forward of a norm: one function where that computes the same, the class's own otherwise.

    Args:
        norm (`nn.Module`): The norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.parameters = norm._parameters  # read in each call, where looking it up would take as long as the rest

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.parameters.get("weight")  # none where it is computed (`torch.nn.utils.parametrize`)
        if weight is not None and not weight.requires_grad:
            if weight.dtype == hidden_states.dtype:
                return apply_rms_norm(hidden_states, self.norm)
            _say_dtypes_differ(hidden_states.dtype, weight.dtype)
        return type(self.norm).forward(self.norm, hidden_states)


@functools.cache
def _say_dtypes_differ(x: torch.dtype, weight: torch.dtype) -> None:
    log_once(
        "An RMSNorm was given %s, and its weight is in %s, so transformers' own forward runs, which is slower. Both "
        "are in param_dtype where FSDP gathers them.",
        format_dtype(x),
        format_dtype(weight),
    )


def fuse_norms(model: nn.Module) -> int:
    """Let the norms of a model run as one function each, where that computes the same.

    Args:
        model (`nn.Module`): The model, sharded or not.
    Returns:
        `int`: How many do.
    """
    unfuse_norms(model)
    named = model.named_modules()
    # What PEFT keeps beside a norm that is trained (`modules_to_save`) does not run, and is none that is fused.
    norms = [module for name, module in named if _is_usual(module) and not name.endswith("original_module")]
    for norm in norms:
        norm.forward = FusedNorm(norm)
    return len(norms)


def unfuse_norms(model: nn.Module) -> None:
    """Give every norm its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedNorm):
            del module.forward


def _is_usual(module: nn.Module) -> bool:
    mine, theirs = getattr(type(module).forward, "__code__", None), LlamaRMSNorm.forward.__code__
    return (
        mine is not None
        and (mine.co_code, mine.co_names, mine.co_consts) == (theirs.co_code, theirs.co_names, theirs.co_consts)
        and "forward" not in module.__dict__  # or another library has replaced it
        and isinstance(module.variance_epsilon, float)
        and not module.weight.requires_grad
    )

"""Attention over packed sequences, each by itself, without a mask.

Packing lays short sequences end to end in one row, and none must see another. With SDPA, transformers says so by a mask
of S x S, which rules out the fast kernels: at 8,192 tokens most of what is computed is thrown away. But the lengths are
known (TRL's collator passes `cu_seq_lens_q`, the first token of each sequence), so attention can be told where
sequences end instead:

* **varlen**: the flash-attention kernel that comes with torch takes the lengths. It is tried on the device first, its
  output and gradients against SDPA's, and used if they agree.
* **one at a time**: elsewhere each sequence goes through SDPA alone. That is exact, and on a CPU faster than the mask.

It is an attention function of transformers' own registry, `"sdpa_packed"`, and SDPA wherever a batch is not packed. The
flash-attention package knows the lengths as well; a model that uses it is left alone. Models whose attention has more
to it (windows, soft caps, sinks), or is not told the lengths, keep the mask, with a line that says so.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import re
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.trial import OtherNumbers, tried
from ..ranks import log_once

NAME = "sdpa_packed"
_MOST_APART = 2**-6
"""Of bfloat16 results of two kernels, relative to their norm: four roundings of 2^-8."""


class _Batch:
    """What is known of the batch that runs: whether the lengths of its sequences came along."""

    has_lengths = False


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model attend to packed sequences one by one.

    Args:
        model (`PreTrainedModel`): The transformers model, sharded or not.
    Returns:
        `bool`: Whether it does so now. Why not is said, unless it has a kernel for it already.
    Raises:
        ValueError: Nothing would keep the sequences apart.
    """
    chosen = model.config._attn_implementation
    if chosen == NAME:
        return True
    if chosen.startswith("flash_attention") or "/" in chosen:  # a kernel from the Hub
        return False
    obstacle = _find_obstacle(model, chosen)
    if obstacle:
        _fall_back(model, obstacle)
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        _fall_back(model, "the model's code has attention of its own, which cannot be replaced")
        return False
    backbone = getattr(model, model.base_model_prefix, model)
    backbone.register_forward_pre_hook(_take_note, with_kwargs=True)
    return True


def _fall_back(model: PreTrainedModel, obstacle: str) -> None:
    """Leave it to the mask to keep sequences apart, if the model has one made that does.

    That takes the positions, which begin anew with each sequence. A model that does not hand them to the function that
    makes the mask gets one for a single long sequence, without a word: gpt-oss, Falcon, MPT, BLOOM and others of
    transformers 5.23. It shows nowhere but in the code.
    """
    backbone = getattr(model, model.base_model_prefix, model)
    try:
        source = inspect.getsource(inspect.unwrap(type(backbone).forward))
    except OSError:  # a class that was written in a cell
        source = ""
    made = re.findall(r"mask_kwargs = \{[^}]*\}|create_\w*mask\w*\([^)]*\)", source)
    if made and not any("position_ids" in call for call in made):
        raise ValueError(
            f"Packing (or padding_free) with {type(model).__name__} and attn_implementation="
            f"{model.config._attn_implementation!r}: {obstacle}, and the mask that transformers makes for it lets "
            'each sequence see those before it in its row. Write packing=False, or attn_implementation="'
            'flash_attention_2" in model_init_kwargs where the model and your GPUs can.'
        )
    log_once("Packed sequences are kept apart by a mask of S x S, which is slow: %s.", obstacle)


def _find_obstacle(model: PreTrainedModel, chosen: str) -> str | None:
    config = model.config.get_text_config()
    if chosen != "sdpa":
        return f'attn_implementation={chosen!r} was asked for; "sdpa" and "flash_attention_2" do without'
    if any("sliding" in kind or "chunked" in kind for kind in getattr(config, "layer_types", None) or ()) or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        return "the model's attention has a window"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model's attention has a soft cap"
    if any("sinks" in dict(module._parameters) for module in model.modules()):
        return "the model's attention has sinks"
    if not all(_hands_on(module) for module in model.modules() if _is_attention(module) or _has_attention(module)):
        return "the model's layers do not tell their attention how long sequences are"
    return None


def _is_attention(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _code_of(module).co_names


def _has_attention(module: nn.Module) -> bool:
    return any(map(_is_attention, module.children()))


def _hands_on(module: nn.Module) -> bool:
    """Return whether a forward calls something with keyword arguments that it does not know by name."""
    return any(instruction.opname == "CALL_FUNCTION_EX" for instruction in dis.get_instructions(_code_of(module)))


def _code_of(module: nn.Module) -> CodeType:
    """Return the code that the author of a class wrote: upstream wraps what it computes twice, and FSDP that."""
    return inspect.unwrap(type(module).forward).__code__


def _take_note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _Batch.has_lengths = kwargs.get("cu_seq_lens_q") is not None and kwargs.get("attention_mask") is None


def _make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask for a packed batch, whose lengths say it all, and SDPA's for every other."""
    return None if _Batch.has_lengths else sdpa_mask(*args, **kwargs)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what causal attention puts out, each sequence by itself.

    Args:
        module (`nn.Module`): The attention layer.
        query (`torch.Tensor`): `[1, heads, S, D]`, or `[B, heads, S, D]` of a batch that is not packed.
        key, value (`torch.Tensor`): The same, with as many heads or fewer.
        attention_mask (`torch.Tensor`, *optional*): Of a batch that is not packed.
        dropout (`float`): Probability to drop a weight.
        scaling (`float`, *optional*): What scores are multiplied by; 1 / sqrt(D) by default.
        cu_seq_lens_q (`torch.Tensor`, *optional*): First token of each sequence, and S (int32).
        max_length_q (`int`, *optional*): The longest sequence.
    Returns:
        `torch.Tensor`: `[B, S, heads, D]`. And no weights.
    """
    if attention_mask is not None or cu_seq_lens_q is None:
        assert attention_mask is not None or not _Batch.has_lengths, "the layer was not given the lengths"
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "packed sequences lie in one row"
    heads, head_dims = (query.shape[1], key.shape[1]), (query.shape[3], value.shape[3])
    if query.is_cuda and (attend_varlen := find_varlen(query.device, query.dtype, *heads, *head_dims)):
        return attend_varlen(query, key, value, cu_seq_lens_q, dropout, scaling, int(max_length_q or 0))[None], None
    return _attend_in_turn(query, key, value, cu_seq_lens_q, dropout, scaling)[None], None


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    dropout: float,
    scaling: float | None,
    longest: int = 0,
) -> torch.Tensor:
    """Return `[S, heads, D]` by the flash-attention kernel of torch."""
    longest = longest or int(starts.diff().max())
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return torch.ops.aten._flash_attention_forward(
        *rows, starts, starts, longest, longest, dropout, True, False, scale=scaling
    )[0]


def _attend_in_turn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return `[S, heads, D]` by SDPA, sequence after sequence."""
    pieces = []
    for start, stop in itertools.pairwise(starts.tolist()):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        pieces.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )[0].transpose(0, 1)
        )
    return torch.cat(pieces)


@tried("Packed sequences attend one at a time instead of in one kernel.")
def find_varlen(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> Callable[..., torch.Tensor]:
    """Return the kernel if it agrees with SDPA on this device, output and gradients.

    It is tried in the first forward that needs it: within a layer, and within what is around one. Gradient
    checkpointing counts what is saved there, and runs the layer again when something is asked for; what the trial saves
    is not its business (the innermost hooks alone see it). Nor is it that of inference mode, or of autocast.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim), (num_heads, value_dim))
        query, key, value, grad = (
            torch.randn(1, heads, 24, size, device=device, dtype=dtype, generator=generator) for heads, size in shapes
        )
        starts = torch.tensor([0, 7, 8, 24], dtype=torch.int32, device=device)
        results = []
        for compute in (_attend_varlen, _attend_in_turn):
            q, k, v = inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            out = compute(q, k, v, starts, 0.0, None)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, grad[0].transpose(0, 1))])
    apart = max(float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True))
    if not apart <= _MOST_APART:
        raise OtherNumbers(f"Its results are {apart:.2g} off.")
    return _attend_varlen

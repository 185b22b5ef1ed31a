"""What runs on cards alone, stood in for on shapes by what it allocates.

Flash attention is its output, one number a row and head, and in the backward an accumulator in float32. Liger's norm
is its output; the gradient of its input takes the place of the output's. Our Triton kernels take no memory but for what
they return.

Source:
    Flash attention's buffers: pytorch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (`mha_fwd`,
    `mha_bwd`). Liger's norm: liger_kernel/ops/rms_norm.py, which writes the gradient of the input over the output's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import packed_linear
from ..experts import layers as experts
from ..experts.stacks import StackLayout, dequantize_pieces
from ..kernels import joined_product, rms_norm, silu_product, swiglu
from ..packing import ALL, PackedLayout, dequantize

_makes_weights = False


def cause_of(func: Any) -> str:
    """Return what the results of an operation are counted as."""
    return "dequantised weights" if _makes_weights or func.namespace == "bitsandbytes" else "activations"


@contextlib.contextmanager
def kernels_stood_in_for() -> Iterator[None]:
    """Have fused layers run on shapes: without their kernels, and with weights known for what they are."""
    in_place_of = [(module, name, getattr(module, name)) for module, name, _ in _STAND_INS]
    for module, name, stand_in in _STAND_INS:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, own in in_place_of:
            setattr(module, name, own)


def _dequantize_pieces(
    stack: torch.Tensor, start: int, stop: int, layout: StackLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Make what `experts/stacks.dequantize_pieces` does, and on the meta device nothing beside it."""
    if not stack.is_meta:
        return dequantize_pieces(stack, start, stop, layout, dtype)
    piece = layout.piece
    shape = (stop - start) * piece.shape[0], piece.shape[1]
    return _dequantize_on_meta(stack, shape, piece, dtype).view(stop - start, *piece.shape)


def _dequantize(
    packed: torch.Tensor,
    layout: PackedLayout,
    dtype: torch.dtype,
    rows: slice = ALL,
    columns: slice = ALL,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make what `packing.dequantize` does, and on the meta device nothing beside it."""
    if not packed.is_meta:
        return dequantize(packed, layout, dtype, rows, columns, out)
    if out is not None and (out.is_contiguous() or layout.has_whole_rows):
        return out
    weight = _dequantize_on_meta(packed, layout.part(rows, columns).shape, layout, dtype)
    return weight if out is None else out  # into which it would be copied


def _dequantize_on_meta(
    packed: torch.Tensor, shape: tuple[int, int], layout: PackedLayout, dtype: torch.dtype
) -> torch.Tensor:
    raw = packed.detach().view(-1)
    return torch.ops.bitsandbytes.dequantize_4bit(
        raw.view(torch.uint8), raw.view(torch.float32), layout.blocksize, layout.quant_type, shape, dtype
    )


def _new_weight(like: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Make room for weights, and have it counted as theirs."""
    global _makes_weights
    _makes_weights = True
    try:
        return like.new_empty(num_rows, num_columns)
    finally:
        _makes_weights = False


_STAND_INS: list[tuple[Any, str, Callable[..., Any]]] = [
    (swiglu, "silu_product", lambda g, u: g.new_empty(g.shape)),
    (swiglu, "write_gradients", lambda *_, **__: None),
    (silu_product, "silu_product", lambda g, u: g.new_empty(g.shape)),
    (silu_product, "write_gradients", lambda *_: None),
    (
        rms_norm,
        "normalize",
        lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)),
    ),
    (rms_norm, "differentiate", lambda dy, x, weight, r: x.new_empty(x.shape)),
    (experts, "dequantize_pieces", _dequantize_pieces),
    (packed_linear, "dequantize", _dequantize),
    (joined_product, "new_weight", _new_weight),
]
"""In place of Triton kernels, which take no memory but for what they return; and what says what it is."""


class FlashAttention(TorchFunctionMode):
    """Has flash attention's buffers allocated where attention is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, _, _ = ctx.saved_tensors
        groups = q.shape[1] // k.shape[1]
        accumulator = q.new_empty(q.shape, dtype=torch.float32)
        # Where heads share keys and values, each gets gradients of its own, which are summed then.
        whole = [part.new_empty(part.shape[0], q.shape[1], *part.shape[2:]) for part in (k, v) if groups > 1]
        grads = [torch.empty_like(part) for part in (q, k, v)]
        del accumulator, whole
        return tuple(grads)


class LigerNorm(torch.autograd.Function):
    """Liger's RMSNorm, by what it keeps and returns."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None

"""A frozen linear layer whose weight is one buffer of bytes (`packing.py`), and how others become one.

By its class it is a layer of bitsandbytes, so PEFT puts its own QLoRA layer around it, and it computes the same
numbers. Neither the packed weight nor its 16-bit form is handed to autograd.

Shape suffixes: T tokens, N out_features, K in_features, M elements of the packed buffer.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

from .kernels.base_product import multiply_base, multiply_gradient
from .packing import ALL, PackedLayout, dequantize, pack


class _PackedLinear(torch.autograd.Function):
    """y = x @ dequantize(w).T + bias, remembering neither w nor its 16-bit form.

    The backward fetches the packed weight from the module again: FSDP has gathered it anew by then, and tensors saved
    for backward would be copied to the host by activation offloading, 4-bit weights among them.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, module: PackedLinear4bit) -> torch.Tensor:
        ctx.module = module
        x_TK = x.reshape(-1, x.shape[-1])
        y_TN = multiply_base(x_TK, module, bias)
        # `linear` may return a view, which callers could not change in place: PEFT does, with adapters chosen by row.
        return torch.ops.aten._unsafe_view(y_TN, (*x.shape[:-1], y_TN.shape[1]))

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        module = ctx.module
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            dy_TN = grad_output.reshape(-1, grad_output.shape[-1])
            grad_x = multiply_gradient(dy_TN, module).view(*grad_output.shape[:-1], module.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None


class PackedLinear4bit(bnb.nn.Linear4bit):
    """A frozen 4-bit linear layer whose weight is one packed buffer.

    It is a `bitsandbytes.nn.Linear4bit` so that PEFT gives it its own QLoRA layer.

    Args:
        layout (`PackedLayout`): Shape and quantisation of the weight.
        bias (`bool`): Whether the layer has a bias, kept in the compute dtype.
        compute_dtype (`torch.dtype`): Dtype of the matrix product.
        storage_dtype (`torch.dtype`): Dtype the packed buffer is viewed in.
    """

    def __init__(
        self, layout: PackedLayout, *, bias: bool, compute_dtype: torch.dtype, storage_dtype: torch.dtype
    ) -> None:
        super().__init__(
            layout.shape[1],
            layout.shape[0],
            bias,
            compute_dtype,
            compress_statistics=layout.double_quant,
            quant_type=layout.quant_type,
            quant_storage=storage_dtype,
            device="meta",
        )
        self.layout = layout
        self.source_cls = nn.Linear
        self.set_packed(torch.empty(layout.packed_shape(storage_dtype), dtype=storage_dtype, device="meta"))
        if bias:
            self.bias = nn.Parameter(torch.empty(layout.shape[0], dtype=compute_dtype, device="meta"), False)

    def set_packed(self, packed: torch.Tensor) -> None:
        """Make `packed` `[M, 1]` the weight of this layer."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.label_weight()

    def label_weight(self) -> None:
        """Tell PEFT, which asks the weight and not the layer, how it is quantised."""
        weight: Any = self.weight
        weight.compress_statistics = self.layout.double_quant
        weight.quant_type = self.layout.quant_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _PackedLinear.apply(x.to(self.compute_dtype), bias, self).to(x.dtype)

    def dequantize(
        self,
        dtype: torch.dtype | None = None,
        rows: slice = ALL,
        columns: slice = ALL,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weight `[N, K]` that this layer computes with, or a piece. It must be gathered, not a shard."""
        return dequantize(self.weight, self.layout, dtype or self.compute_dtype, rows, columns, out)

    def row_pieces(self, dtype: torch.dtype) -> list[slice]:
        """Return the rows that are dequantised at a time, so that a large weight is never there in 16 bits."""
        return self.layout.row_pieces(dtype)

    def column_pieces(self, dtype: torch.dtype) -> list[slice]:
        """Return the columns that are dequantised at a time, likewise."""
        return self.layout.column_pieces(dtype)

    @property
    def W_q(self) -> torch.Tensor:
        """PEFT's sign for "ask the layer to dequantise, not its weight", as DoRA does (peft utils/integrations.py)."""
        return self.weight

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{super().extra_repr()}, {layout.quant_type}, double_quant={layout.double_quant}"


def repack(linear: bnb.nn.Linear4bit, *, compute_dtype: torch.dtype, storage_dtype: torch.dtype) -> PackedLinear4bit:
    """Turn a layer of bitsandbytes, on the meta device or quantised, into a packed one.

    Args:
        linear (`bitsandbytes.nn.Linear4bit`): The layer. Its codes and scales are copied byte for byte.
        compute_dtype (`torch.dtype`): Dtype of the matrix product.
        storage_dtype (`torch.dtype`): Dtype the packed buffer is viewed in.
    """
    weight, codes = linear.weight, linear.weight.data
    # fully_shard and torch.compile strip the Params4bit class, not the state that the layer keeps for that case.
    state = getattr(weight, "quant_state", None) or linear.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = _undo_evaluation(codes, state)
    layout = PackedLayout(
        (linear.out_features, linear.in_features),
        weight.quant_type if state is None else state.quant_type,
        weight.compress_statistics if state is None else state.nested,
        getattr(weight, "blocksize", 64) if state is None else state.blocksize,
    )
    packed_linear = PackedLinear4bit(
        layout, bias=linear.bias is not None, compute_dtype=compute_dtype, storage_dtype=storage_dtype
    )
    packed_linear.source_cls = getattr(linear, "source_cls", nn.Linear)  # set by transformers where it replaced a layer
    if state is not None:
        packed_linear.set_packed(pack(codes, state, layout, storage_dtype))
    if linear.bias is not None:
        bias = linear.bias.detach().to(compute_dtype)
        packed_linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    packed_linear.train(linear.training)
    return packed_linear


def _undo_evaluation(
    codes: torch.Tensor, state: bnb_functional.QuantState
) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    """Put codes back in order that an evaluation on an AVX512 CPU has re-ordered in place.

    The codes are the same as before. The scales are not: that evaluation rounds them to bfloat16.

    Source:
        bitsandbytes 0.50 (nn/modules.py, `Linear4bit.forward`), whose own inverse forgets the order of plain scales.
    """
    state = copy.copy(state)
    codes, state = bnb_functional._convert_weight_packed_for_cpu_inverse(codes, state)
    if not state.nested:
        state.absmax = state.absmax.T.reshape(-1).float()
    return codes, state

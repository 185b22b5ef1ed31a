"""Products with a frozen 4-bit weight, of which no more than a piece is there in 16 bits: y = x W' + b, dx = dy W.

What a weight takes in 16 bits adds to the peak of a step. So a large one is made a piece at a time, and each piece is
gone before the next is made (`packing.PIECE_BYTES`). Either way a piece gives columns of the result, which are rounded
as often as in one product:

    forward     y[:, rows] = x W[rows]'
    backward    dx[:, columns] = dy W[:, columns]

The layer, a `packed_linear.PackedLinear4bit`, says which (`row_pieces`, `column_pieces`) and makes them (`dequantize`).
No piece is given a name in these loops: it would still be held by it while the next one is made.

Shape suffixes: T tokens, N out_features, K in_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def multiply_base(x_TK: torch.Tensor, base: Any, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Return x W' + b `[T, N]`, the bias rounded into the sum once, with the product."""
    pieces = base.row_pieces(x_TK.dtype)
    if len(pieces) == 1:
        return nn.functional.linear(x_TK, base.dequantize(x_TK.dtype), bias_N)
    y_TN = x_TK.new_empty(x_TK.shape[0], base.out_features)
    if bias_N is not None:
        return add_base_product(y_TN.copy_(bias_N), x_TK, base)
    for rows in pieces:
        torch.mm(x_TK, base.dequantize(x_TK.dtype, rows).t(), out=y_TN[:, rows])
    return y_TN


def add_base_product(y_TN: torch.Tensor, x_TK: torch.Tensor, base: Any) -> torch.Tensor:
    """Return y `[T, N]` with x W' added to it, in place."""
    for rows in base.row_pieces(x_TK.dtype):
        _columns(y_TN, rows).addmm_(x_TK, base.dequantize(x_TK.dtype, rows).t())
    return y_TN


def multiply_gradient(dy_TN: torch.Tensor, base: Any) -> torch.Tensor:
    """Return dy W `[T, K]`."""
    pieces = base.column_pieces(dy_TN.dtype)
    if len(pieces) == 1:
        return dy_TN.mm(base.dequantize(dy_TN.dtype))
    dx_TK = dy_TN.new_empty(dy_TN.shape[0], base.in_features)
    for columns in pieces:
        torch.mm(dy_TN, base.dequantize(dy_TN.dtype, columns=columns), out=dx_TK[:, columns])
    return dx_TK


def add_gradient_product(dx_TK: torch.Tensor, dy_TN: torch.Tensor, base: Any) -> torch.Tensor:
    """Return dx `[T, K]` with dy W added to it, in place."""
    for columns in base.column_pieces(dy_TN.dtype):
        _columns(dx_TK, columns).addmm_(dy_TN, base.dequantize(dy_TN.dtype, columns=columns))
    return dx_TK


def _columns(tensor: torch.Tensor, piece: slice) -> torch.Tensor:
    return tensor if piece == slice(None) else tensor[:, piece]

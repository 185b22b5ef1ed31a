"""Layers that read one input as one product, what their adapters add included.

Layer by layer, a low-rank part is written as wide as the output and read again by the product that is added to it, and
in the backward each layer reads and writes the gradient of the input anew. For the gate and up of a gated MLP, whose
outputs are the widest of a model, that is a tenth of their time. But a sum of two products is one product, of things
that lie side by side:

    forward     [y_1 | y_2] = [x | h] [[W_1, B_1, 0], [W_2, 0, B_2]]'          h = [s_1 x A_1' | s_2 x A_2']
    backward    dx = [dy_1 | dy_2 | dh] [W_1; W_2; A_1; A_2]                   dh_i = s_i dy_i B_i

So everything is summed up in float32, inside the product, and is rounded once. A bias is one column more, beside an
input of ones. What it takes is a copy of x with room for h beside it, which is kept in x's place, and weights that are
dequantised into rows with room for B.

**Where it does not pay**: for outputs no wider than x, the copy takes as long as it saves (an H100, 16,384 tokens, q, k
and v of an 8B: 1.42 ms joined, 1.36 one by one; its gate and up: 5.31 and 6.70).

**Pieces.** Weights that are too large together are made a piece at a time, as one alone is (`base_product.py`): some
rows of one layer in the forward, the same columns of all in the backward.

Shape suffixes: T tokens, K in_features, N sum of out_features, S sum of ranks; C = K + S and a column for biases, and
D = N + S, both with some zeros at the end, so that rows begin at multiples of 32 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .lora_linear import LoraWeights

_ALL = slice(None)
_STEP = 16
"""What a width is a multiple of, in numbers: rows of matrices are read 16 bytes at a time, and Triton asks for this."""


class JoinedLayers:
    """Layers with their adapters that read one input `[T, K]`.

    Args:
        layers (`Sequence[LoraWeights]`): The layers. What each adapter is multiplied by is said with every input.
    """

    def __init__(self, layers: Sequence[LoraWeights]) -> None:
        self.layers = tuple(layers)
        self.in_features = layers[0].base.in_features
        self.outputs = _slices(layer.base.out_features for layer in layers)
        self.ranks = _slices(layer.lora_a.out_features for layer in layers)
        self.num_outputs, self.rank = self.outputs[-1].stop, self.ranks[-1].stop
        self.has_bias = any(layer.base.bias is not None for layer in layers)
        self.width_C = _round_up(self.in_features + self.rank + self.has_bias)
        self.width_D = _round_up(self.num_outputs + self.rank)
        self.end_K, self.end_S = self.in_features, self.in_features + self.rank  # in [x | h]

    def extend_input(self, x_TK: torch.Tensor, scalings: Sequence[float]) -> torch.Tensor:
        """Return `[T, C]`: x, s_i x A_i' of each layer, and a one if there are biases."""
        xh_TC = x_TK.new_empty(x_TK.shape[0], self.width_C)
        _copy(xh_TC[:, : self.end_K], x_TK)
        h_TS = xh_TC[:, self.end_K : self.end_S]
        if len(set(scalings)) == 1:
            a_SK = torch.cat([layer.lora_a.weight for layer in self.layers])
            h_TS.addmm_(x_TK, a_SK.t(), beta=0, alpha=scalings[0])
        else:
            for layer, scaling, ranks in zip(self.layers, scalings, self.ranks, strict=True):
                h_TS[:, ranks].addmm_(x_TK, layer.lora_a.weight.t(), beta=0, alpha=scaling)
        if self.width_C > self.end_S:
            xh_TC[:, self.end_S :].zero_()
            if self.has_bias:
                xh_TC[:, self.end_S].fill_(1)
        return xh_TC

    def multiply(self, xh_TC: torch.Tensor) -> torch.Tensor:
        """Return `[T, D]`: what the layers put out, side by side, with room for dh of their gradients behind it."""
        y_TD = xh_TC.new_empty(xh_TC.shape[0], self.width_D)
        for pieces in self._cut_outputs(xh_TC.dtype):
            start, stop = pieces[0][1], pieces[-1][2]
            torch.mm(xh_TC, self._make_rows(pieces, xh_TC).t(), out=y_TD[:, start:stop])
        return y_TD

    def split(self, y_TD: torch.Tensor) -> list[torch.Tensor]:
        """Return what each layer has put out, views `[T, N_i]`."""
        return [y_TD[:, columns] for columns in self.outputs]

    def differentiate(
        self,
        dy_TD: torch.Tensor,
        xh_TC: torch.Tensor,
        scalings: Sequence[float],
        needs_x: bool,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Return dx `[T, K]` and dA, dB of each layer, `None` for what nobody needs.

        Args:
            dy_TD (`torch.Tensor`): Gradients of what `multiply` has put out. What lies behind them is overwritten.
            xh_TC (`torch.Tensor`): What `extend_input` has put out.
            scalings (`Sequence[float]`): What each adapter is multiplied by.
            needs_x (`bool`), needs (`Sequence[bool]`): Which: of A_1, B_1, A_2, B_2.
        """
        grads: list[torch.Tensor | None] = [None] * len(needs)
        h_TS = xh_TC[:, self.end_K : self.end_S]
        dh_TS = dy_TD[:, self.num_outputs : self.num_outputs + self.rank]
        dys = self.split(dy_TD)
        for index, (layer, scaling, ranks) in enumerate(zip(self.layers, scalings, self.ranks, strict=True)):
            if needs[2 * index + 1]:
                grads[2 * index + 1] = dys[index].t().mm(h_TS[:, ranks])  # scaled, as h is
            dh_TS[:, ranks].addmm_(dys[index], layer.lora_b.weight, beta=0, alpha=scaling)
        if any(needs[::2]):
            da_SK = dh_TS.t().mm(xh_TC[:, : self.end_K])
            for index, ranks in enumerate(self.ranks):
                if needs[2 * index]:
                    grads[2 * index] = da_SK[ranks]
        return self._multiply_gradient(dy_TD) if needs_x else None, grads

    def _multiply_gradient(self, dy_TD: torch.Tensor) -> torch.Tensor:
        if self.width_D > self.num_outputs + self.rank:
            dy_TD[:, self.num_outputs + self.rank :].zero_()
        pieces = self._cut_inputs(dy_TD.dtype)
        if pieces == [_ALL]:
            return dy_TD.mm(self._make_columns(_ALL, dy_TD))
        dx_TK = dy_TD.new_empty(dy_TD.shape[0], self.in_features)
        for columns in pieces:
            torch.mm(dy_TD, self._make_columns(columns, dy_TD), out=dx_TK[:, columns])
        return dx_TK

    def _make_rows(self, pieces: list[tuple[int, int, int]], like: torch.Tensor) -> torch.Tensor:
        """Return `[W, B, bias]` of some outputs, `[N, C]`."""
        first = pieces[0][1]
        w_NC = new_weight(like, pieces[-1][2] - first, self.width_C)
        w_NC[:, self.end_K :].zero_()
        for index, start, stop in pieces:
            layer, offset, ranks = self.layers[index], self.outputs[index].start, self.ranks[index]
            part_NC, rows = w_NC[start - first : stop - first], slice(start - offset, stop - offset)
            rows = _ALL if rows == slice(0, layer.base.out_features) else rows
            layer.base.dequantize(like.dtype, rows, out=part_NC[:, : self.end_K])
            part_NC[:, self.end_K + ranks.start : self.end_K + ranks.stop].copy_(layer.lora_b.weight[rows])
            if layer.base.bias is not None:
                part_NC[:, self.end_S].copy_(layer.base.bias[rows])
        return w_NC

    def _make_columns(self, columns: slice, like: torch.Tensor) -> torch.Tensor:
        """Return `[W_1; W_2; A_1; A_2]` for some inputs, `[D, K]`."""
        w_DK = new_weight(like, self.width_D, len(range(self.in_features)[columns]))
        for layer, rows in zip(self.layers, self.outputs, strict=True):
            layer.base.dequantize(like.dtype, columns=columns, out=w_DK[rows])
        end = self.num_outputs + self.rank
        torch.cat([layer.lora_a.weight[:, columns] for layer in self.layers], out=w_DK[self.num_outputs : end])
        if self.width_D > end:
            w_DK[end:].zero_()
        return w_DK

    def _cut_outputs(self, dtype: torch.dtype) -> list[list[tuple[int, int, int]]]:
        """Return what is made at a time: pieces (layer, first output, one after the last), which lie side by side."""
        if self._layout_of_all().row_pieces(dtype) == [_ALL]:
            return [[(index, columns.start, columns.stop) for index, columns in enumerate(self.outputs)]]
        cut = []
        for index, (layer, columns) in enumerate(zip(self.layers, self.outputs, strict=True)):
            for rows in layer.base.row_pieces(dtype):
                start, stop, _ = rows.indices(layer.base.out_features)
                cut.append([(index, columns.start + start, columns.start + stop)])
        return cut

    def _cut_inputs(self, dtype: torch.dtype) -> list[slice]:
        return self._layout_of_all().column_pieces(dtype)

    def _layout_of_all(self) -> Any:
        """Return the layout of one weight as large as all together, whose columns are cut into blocks of each."""
        layouts = [layer.base.layout for layer in self.layers]
        return replace(max(layouts, key=lambda layout: layout.blocksize), shape=(self.num_outputs, self.in_features))


def new_weight(like: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Return room for weights, in the dtype of products."""
    return like.new_empty(num_rows, num_columns)


def _copy(to: torch.Tensor, x: torch.Tensor) -> None:
    """Copy a matrix into wider rows. Eight bytes at a time: torch copies what is not contiguous number by number."""
    numbers = 8 // x.dtype.itemsize
    sizes = x.shape[1], x.stride(0), to.stride(0), x.storage_offset()
    if x.stride(1) == 1 and all(size % numbers == 0 for size in sizes):
        to, x = to.view(torch.int64), x.view(torch.int64)
    to.copy_(x)


def _slices(sizes: Iterable[int]) -> list[slice]:
    bounds = list(itertools.accumulate(sizes, initial=0))
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _round_up(size: int) -> int:
    return -(-size // _STEP) * _STEP

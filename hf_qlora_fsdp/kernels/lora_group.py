"""Layers that read one input, queries, keys and values say, as one function: y_i = x W_i' + b_i + s_i (x A_i') B_i'.

As functions of their own, each reads x for its thin product, leaves a gradient for x, and autograd adds these. Here all
A lie below each other, so that x is read once for the thin products of all layers, in the forward and for the gradients
of A; and what reaches x is added where the first lies, by the products themselves:

    forward     h = x A'      y_i = s_i h_i B_i'      y_i += x W_i' + b_i
    backward    dh_i = s_i dy_i B_i      dx = dh A      dx += dy_i W_i      dA = dh' x      dB_i = s_i dy_i' h_i

What is kept, and where weights are found again, is as for one layer (`lora_linear.py`).

Shape suffixes: T tokens, N out_features, K in_features, R rank of a layer, S sum of the ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .base_product import add_gradient_product
from .lora_linear import LoraWeights, add_products, backward_to_b


def _stack_a(layers: tuple[LoraWeights, ...]) -> torch.Tensor:
    return torch.cat([layer.lora_a.weight for layer in layers])


def _rank_slices(layers: tuple[LoraWeights, ...]) -> list[slice]:
    bounds = itertools.accumulate((layer.lora_a.out_features for layer in layers), initial=0)
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, scalings, *parameters):
        x_TK = x.reshape(-1, x.shape[-1])
        h_TS = x_TK.mm(_stack_a(layers).t())
        outputs = []
        for layer, scaling, ranks in zip(layers, scalings, _rank_slices(layers), strict=True):
            y_TN = add_products(x_TK, h_TS[:, ranks], layer, layer.lora_b.weight, scaling)
            outputs.append(torch.ops.aten._unsafe_view(y_TN, (*x.shape[:-1], y_TN.shape[1])))
        needs = ctx.needs_input_grad[3:]
        ctx.save_for_backward(x if any(needs[::2]) else None, h_TS if any(needs[1::2]) else None)
        ctx.layers, ctx.scalings, ctx.x_shape = layers, scalings, x.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        layers, scalings = ctx.layers, ctx.scalings
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        x, h_TS = ctx.saved_tensors
        slices = _rank_slices(layers)
        dys_TN = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        grads = [None] * len(needs)
        dh_TS = dys_TN[0].new_empty(dys_TN[0].shape[0], slices[-1].stop)
        for index, (dy_TN, layer, scaling, ranks) in enumerate(zip(dys_TN, layers, scalings, slices, strict=True)):
            if needs[2 * index + 1]:
                grads[2 * index + 1] = backward_to_b(dy_TN, h_TS[:, ranks], scaling)
            dh_TS[:, ranks].addmm_(dy_TN, layer.lora_b.weight, beta=0, alpha=scaling)
        if any(needs[::2]):
            da_SK = dh_TS.t().mm(x.reshape(-1, x.shape[-1]))
            for index, ranks in enumerate(slices):
                if needs[2 * index]:
                    grads[2 * index] = da_SK[ranks]
        dx = None
        if needs_x:
            dx_TK = dh_TS.mm(_stack_a(layers))
            for dy_TN, layer in zip(dys_TN, layers, strict=True):
                add_gradient_product(dx_TK, dy_TN, layer.base)
            dx = dx_TK.view(ctx.x_shape)
        return dx, None, None, *grads


def apply_lora_group(
    x: torch.Tensor, layers: tuple[LoraWeights, ...], scalings: tuple[float, ...]
) -> tuple[torch.Tensor, ...]:
    """Return what 4-bit layers with their adapters put out for one input.

    Args:
        x (`torch.Tensor`): Input `[..., K]`, in the dtype of every A and B, which is that of the products.
        layers (`tuple[LoraWeights, ...]`): The layers. Their biases are not trained.
        scalings (`tuple[float, ...]`): What each adapter is multiplied by.
    Returns:
        `tuple[torch.Tensor, ...]`: Outputs `[..., N]`, one a layer. Gradients reach x, and every A and B.
    """
    parameters: list[Any] = [part.weight for layer in layers for part in (layer.lora_a, layer.lora_b)]
    return _LoraGroup.apply(x, layers, scalings, *parameters)

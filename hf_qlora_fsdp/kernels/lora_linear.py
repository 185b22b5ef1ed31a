"""A frozen 4-bit layer and its adapter as one function: y = x W' + b + s (x A') B'.

PEFT's layer runs the base, clones its result, runs A, runs B, scales, and adds: four passes over the output beside the
product, and the same again for gradients. Here the low-rank part comes first, scaled while it still is a float32 sum,
and the base product is added to it by the matrix product itself (`addmm_`), which reads each number once, while it
computes. The other way round, the thin product would read and write all of the output again. So nothing is copied, and
numbers are rounded less often:

    forward     h = x A'         y = s h B'           y += x W'
    backward    dh = s dy B      dx = dh A            dx += dy W         dA = dh' x        dB = s dy' h

In bfloat16 that is 1.7e-3 off in place of PEFT's 2.4e-3 where the adapter adds little, and never more than PEFT.

**What is kept for the backward** is x itself, which other layers that read it keep as well, and h, which is thin. The
16-bit weight is made again, and the packed one, A and B are fetched from their modules again: FSDP has gathered them
anew by then, and what autograd keeps would be copied to the host by activation offloading. Gradients of gradients
would miss all that is not kept by autograd, so asking for one is an error.

Shape suffixes: T tokens, N out_features, K in_features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .base_product import add_base_product, add_gradient_product, multiply_base


class LoraWeights:
    """Where the weights of one layer are found, now and again in the backward.

    Args:
        base (`packed_linear.PackedLinear4bit`): The frozen layer.
        lora_a (`nn.Linear`): A, its weight `[R, K]`.
        lora_b (`nn.Linear`): B, its weight `[N, R]`.
    """

    __slots__ = ("base", "lora_a", "lora_b")

    def __init__(self, base: Any, lora_a: nn.Linear, lora_b: nn.Linear) -> None:
        self.base = base
        self.lora_a = lora_a
        self.lora_b = lora_b


def forward_product(
    x: torch.Tensor, weights: LoraWeights, a_RK: torch.Tensor, b_NR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y `[..., N]` and h `[T, R]` for x `[..., K]`."""
    x_TK = x.reshape(-1, x.shape[-1])
    h_TR = x_TK.mm(a_RK.t())
    y_TN = add_products(x_TK, h_TR, weights, b_NR, scaling)
    # A plain view of something made in here could not be changed in place by those who get it.
    return torch.ops.aten._unsafe_view(y_TN, (*x.shape[:-1], y_TN.shape[1])), h_TR


def add_products(
    x_TK: torch.Tensor, h_TR: torch.Tensor, weights: LoraWeights, b_NR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return y `[T, N]`, the low-rank part and the base product.

    A bias, which may be larger than both, is rounded into a sum once: with the base product, which then comes first.
    """
    base = weights.base
    if base.bias is not None:
        return multiply_base(x_TK, base, base.bias.to(x_TK.dtype)).addmm_(h_TR, b_NR.t(), alpha=scaling)
    y_TN = h_TR.new_empty(h_TR.shape[0], b_NR.shape[0]).addmm_(h_TR, b_NR.t(), beta=0, alpha=scaling)
    return add_base_product(y_TN, x_TK, base)


def backward_through_b(dy_TN: torch.Tensor, weights: LoraWeights, scaling: float) -> torch.Tensor:
    """Return dh `[T, R]`, the gradient of what A puts out, for dy `[T, N]`."""
    b_NR = weights.lora_b.weight
    return dy_TN.new_empty(dy_TN.shape[0], b_NR.shape[1]).addmm_(dy_TN, b_NR, beta=0, alpha=scaling)


def backward_to_input(
    dy_TN: torch.Tensor, dh_TR: torch.Tensor, weights: LoraWeights, dx_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return dx `[T, K]`, added into the one that another layer with the same input has left."""
    a_RK = weights.lora_a.weight
    dx_TK = dh_TR.mm(a_RK) if dx_TK is None else dx_TK.addmm_(dh_TR, a_RK)
    return add_gradient_product(dx_TK, dy_TN, weights.base)


def backward_to_b(dy_TN: torch.Tensor, h_TR: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return dB `[N, R]`."""
    return dy_TN.new_empty(dy_TN.shape[1], h_TR.shape[1]).addmm_(dy_TN.t(), h_TR, beta=0, alpha=scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a_RK, b_NR, weights, scaling):
        y, h_TR = forward_product(x, weights, a_RK, b_NR, scaling)
        _, needs_a, needs_b, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, h_TR if needs_b else None)
        ctx.weights, ctx.scaling, ctx.x_shape = weights, scaling, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weights, scaling = ctx.weights, ctx.scaling
        needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        x, h_TR = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        dx = da_RK = db_NR = None
        if needs_b:
            db_NR = backward_to_b(dy_TN, h_TR, scaling)
        if needs_x or needs_a:
            dh_TR = backward_through_b(dy_TN, weights, scaling)
        if needs_a:
            da_RK = dh_TR.t().mm(x.reshape(-1, x.shape[-1]))
        if needs_x:
            dx = backward_to_input(dy_TN, dh_TR, weights).view(ctx.x_shape)
        return dx, da_RK, db_NR, None, None


def apply_lora_linear(x: torch.Tensor, weights: LoraWeights, scaling: float) -> torch.Tensor:
    """Return what a 4-bit layer with its adapter puts out.

    Args:
        x (`torch.Tensor`): Input `[..., K]`, in the dtype of A and B, which is that of the product.
        weights (`LoraWeights`): The layer. Its bias is not trained.
        scaling (`float`): s.
    Returns:
        `torch.Tensor`: Output `[..., N]`. Gradients reach x, A and B.
    Source:
        LoRA, arXiv:2106.09685, equation 3.
    """
    return _LoraLinear.apply(x, weights.lora_a.weight, weights.lora_b.weight, weights, scaling)

"""The gated MLP of Llama and its kin, adapters included: y = down(silu(gate(x)) * up(x)).

Layer by layer, autograd keeps four tensors of the wide inner size: what gate puts out, its silu, what up puts out, and
their product, which down reads. Here it keeps two, and makes the others again in the backward, which costs a pass over
each. Gate and up read the same input, so their gradients for it are added where the first lies, by the product itself.

**Two functions, the second of which keeps nothing.** Gradient checkpointing runs a layer's forward again in the
backward, and stops once everything that was kept is there again. An MLP is the last thing in a layer. As one function
it would have to be run to its end, and the product of down, a third of it, is needed by nobody a second time. So
`_Down` takes all that its backward needs from what `_Gated` has kept, whose backward comes next and gets it handed on.

The forward has the bits of the three layers and of torch between them (`lora_linear.py`, `silu_product.py`).

Shape suffixes: T tokens, K hidden size, I inner size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .lora_linear import (
    LoraWeights,
    apply_lora_linear,
    backward_through_b,
    backward_to_b,
    backward_to_input,
    forward_product,
)
from .silu_product import silu_product, silu_product_gradients


class _Gated(torch.autograd.Function):
    """m = silu(gate(x)) * up(x)."""

    @staticmethod
    def forward(ctx, x, gate_a, gate_b, up_a, up_b, layers, scalings):
        (gate, up), (gate_scaling, up_scaling) = layers, scalings
        g, gate_h = forward_product(x, gate, gate_a, gate_b, gate_scaling)
        u, up_h = forward_product(x, up, up_a, up_b, up_scaling)
        ctx.save_for_backward(x, g, u, gate_h, up_h)
        ctx.layers, ctx.scalings, ctx.handed_on = layers, scalings, None
        return silu_product(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx, dm):
        # What checkpointing has made again can be taken once, and `_Down` has.
        (x, g, u, gate_h, up_h), ctx.handed_on = ctx.handed_on, None
        needs_x, *needs = ctx.needs_input_grad[:5]
        x_TK, dm_TI = x.reshape(-1, x.shape[-1]), dm.view(-1, dm.shape[-1])
        dg_TI, du_TI = silu_product_gradients(dm_TI, g.view(dm_TI.shape), u.view(dm_TI.shape))
        # Before 16-bit weights are made. They go if checkpointing has made them; what the forward kept is autograd's,
        # and stays until this node is done.
        del g, u
        (gate, up), (gate_scaling, up_scaling) = ctx.layers, ctx.scalings
        dx_TK, *gate_grads = _backward_of_layer(x_TK, dg_TI, gate_h, gate, gate_scaling, needs_x, needs[:2], None)
        del dg_TI
        dx_TK, *up_grads = _backward_of_layer(x_TK, du_TI, up_h, up, up_scaling, needs_x, needs[2:], dx_TK)
        return (None if dx_TK is None else dx_TK.view(x.shape), *gate_grads, *up_grads, None, None)


def _backward_of_layer(
    x_TK: torch.Tensor,
    d_TI: torch.Tensor,
    h_TR: torch.Tensor,
    layer: LoraWeights,
    scaling: float,
    needs_x: bool,
    needs: Sequence[bool],
    dx_TK: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return dx, added into the one that is given, dA and dB of gate or up, each if it is needed."""
    needs_a, needs_b = needs
    da_RK = db_IR = None
    if needs_b:
        db_IR = backward_to_b(d_TI, h_TR, scaling)
    if needs_x or needs_a:
        dh_TR = backward_through_b(d_TI, layer, scaling)
    if needs_a:
        da_RK = dh_TR.t().mm(x_TK)
    if needs_x:
        dx_TK = backward_to_input(d_TI, dh_TR, layer, dx_TK)
    return dx_TK, da_RK, db_IR


class _Down(torch.autograd.Function):
    """y = down(m), for an m that `_Gated` has put out."""

    @staticmethod
    def forward(ctx, m, down_a, down_b, down, scaling, gated):
        y, _ = forward_product(m, down, down_a, down_b, scaling)
        ctx.down, ctx.scaling, ctx.gated = down, scaling, gated
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        down, scaling, gated = ctx.down, ctx.scaling, ctx.gated
        _, needs_a, needs_b, *_ = ctx.needs_input_grad
        gated.handed_on = _, g, u, *_ = gated.saved_tensors
        dy_TK = dy.reshape(-1, dy.shape[-1])
        da_RI = db_KR = None
        dh_TR = backward_through_b(dy_TK, down, scaling)
        if needs_a or needs_b:
            m_TI = silu_product(g, u).view(-1, g.shape[-1])
            if needs_a:
                da_RI = dh_TR.t().mm(m_TI)
            if needs_b:
                db_KR = backward_to_b(dy_TK, m_TI.mm(down.lora_a.weight.t()), scaling)
            del m_TI  # before the 16-bit weight is made
        dm = backward_to_input(dy_TK, dh_TR, down).view(g.shape)
        return dm, da_RI, db_KR, None, None, None


def apply_swiglu(
    x: torch.Tensor, layers: tuple[LoraWeights, LoraWeights, LoraWeights], scalings: tuple[float, float, float]
) -> torch.Tensor:
    """Return what a gated MLP puts out.

    Args:
        x (`torch.Tensor`): Input `[..., K]`, in the dtype of every A and B, which is that of the products.
        layers (`tuple[LoraWeights, LoraWeights, LoraWeights]`): Gate, up and down. Their biases are not trained.
        scalings (`tuple[float, float, float]`): What each adapter is multiplied by.
    Returns:
        `torch.Tensor`: Output `[..., K]`. Gradients reach x, and every A and B.
    Source:
        SwiGLU, arXiv:2002.05202, equation 6.
    """
    *inner, down = layers
    *inner_scalings, down_scaling = scalings
    parameters = [part.weight for layer in inner for part in (layer.lora_a, layer.lora_b)]
    m: Any = _Gated.apply(x, *parameters, inner, inner_scalings)
    if m.grad_fn is None:  # nothing before down wants a gradient, so nothing was kept
        return apply_lora_linear(m, down, down_scaling)
    return _Down.apply(m, down.lora_a.weight, down.lora_b.weight, down, down_scaling, m.grad_fn)

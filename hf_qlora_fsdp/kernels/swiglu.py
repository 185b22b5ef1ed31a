"""The gated MLP of Llama and its kin, adapters included: y = down(silu(gate(x)) * up(x)).

Layer by layer, autograd keeps four tensors of the wide inner size: what gate puts out, its silu, what up puts out, and
their product, which down reads. Here it keeps two, side by side as one product has put them out (`joined_product.py`),
and makes the others again in the backward, which costs a pass over each.

**Two functions, the second of which saves nothing.** Gradient checkpointing runs a layer's forward again in the
backward, and stops once everything that was kept is there again. An MLP is the last thing in a layer. As one function
it would have to be run to its end, and the product of down, a third of it, is needed by nobody a second time. So
`_Down` takes all that its backward needs from what `_GateUp` has kept, whose backward comes next and gets it handed on.
All but h, what A of down puts out, which would take reading m: R numbers a token, and those of the forward stay.

**In place where nobody looks.** What checkpointing has made again is for this backward alone, so gradients are written
over it. What the forward itself has kept stays as it is, for whoever goes through the graph a second time. m is made
again by the pass that makes these gradients, and takes the place of its own.

Shape suffixes: T tokens, K hidden size, I inner size, R rank; C = K and what `joined_product.py` adds to it, and
D = 2 I and what it adds.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .joined_product import JoinedLayers
from .lora_linear import (
    LoraWeights,
    apply_lora_linear,
    backward_through_b,
    backward_to_b,
    backward_to_input,
    forward_product,
)
from .silu_product import silu_product, write_gradients


class _GateUp(torch.autograd.Function):
    """What gate and up put out, side by side, `[T, D]`."""

    @staticmethod
    def forward(ctx, x, gate_a, gate_b, up_a, up_b, gate_and_up, scalings):
        xh_TC = gate_and_up.extend_input(x.reshape(-1, x.shape[-1]), scalings)
        gu_TD = gate_and_up.multiply(xh_TC)
        ctx.save_for_backward(xh_TC, gu_TD)
        ctx.gate_and_up, ctx.scalings, ctx.handed_on, ctx.x_shape = gate_and_up, scalings, None, x.shape
        ctx.kept = weakref.ref(gu_TD.untyped_storage())
        ctx.overwritten = None
        return gu_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TD):
        # What checkpointing has made again can be taken once, and `_Down` has.
        xh_TC, ctx.handed_on = ctx.handed_on, None
        needs_x, *needs = ctx.needs_input_grad[:5]
        dx_TK, grads = ctx.gate_and_up.differentiate(d_TD, xh_TC, ctx.scalings, needs_x, needs)
        return (None if dx_TK is None else dx_TK.view(ctx.x_shape), *grads, None, None)


class _Down(torch.autograd.Function):
    """y = down(m), m = silu(g) * u, for g and u that `_GateUp` has put out."""

    @staticmethod
    def forward(ctx, gu_TD, down_a, down_b, down, scaling, gate_up, shape):
        m_TI = silu_product(*gate_up.gate_and_up.split(gu_TD))
        y_TK, h_TR = forward_product(m_TI, down, down_a, down_b, scaling)
        ctx.h_TR = h_TR if ctx.needs_input_grad[2] else None
        ctx.down, ctx.scaling, ctx.gate_up = down, scaling, gate_up
        # A plain view of something made in here could not be changed in place by those who get it.
        return torch.ops.aten._unsafe_view(y_TK, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        down, scaling, gate_up = ctx.down, ctx.scaling, ctx.gate_up
        _, needs_a, needs_b, *_ = ctx.needs_input_grad
        split = gate_up.gate_and_up.split
        xh_TC, gu_TD = gate_up.saved_tensors
        if gate_up.overwritten is not None and gate_up.overwritten() is gu_TD.untyped_storage():
            raise RuntimeError(
                "Tensors that an earlier backward was given, and wrote over, were given to this one as well. Hooks for "
                "saved tensors that keep none of the forward's must return new ones each time they are asked."
            )
        dy_TK = dy.reshape(-1, dy.shape[-1])
        da_RI = db_KR = None
        dh_TR = backward_through_b(dy_TK, down, scaling)
        dm_TI = backward_to_input(dy_TK, dh_TR, down)
        if gate_up.kept() is None:
            d_TD, gate_up.overwritten = gu_TD, weakref.ref(gu_TD.untyped_storage())
        else:
            d_TD = torch.empty_like(gu_TD)
        write_gradients(dm_TI, *split(gu_TD), *split(d_TD), make_m=needs_a)
        if torch.is_anomaly_enabled():  # looks at all of it, and behind the gradients nothing is written yet
            d_TD[:, gate_up.gate_and_up.num_outputs :].zero_()
        m_TI = dm_TI  # by now
        if needs_a:
            da_RI = dh_TR.t().mm(m_TI)
        if needs_b:
            db_KR = backward_to_b(dy_TK, ctx.h_TR, scaling)
        # As aliases, so that hooks that have fetched them, TRL's offloading say, see that they are in use.
        gate_up.handed_on = xh_TC.detach()
        return d_TD.detach(), da_RI, db_KR, None, None, None, None


def apply_swiglu(
    x: torch.Tensor, gate_and_up: JoinedLayers, down: LoraWeights, scalings: tuple[float, float, float]
) -> torch.Tensor:
    """Return what a gated MLP puts out.

    Args:
        x (`torch.Tensor`): Input `[..., K]`, in the dtype of every A and B, which is that of the products.
        gate_and_up (`JoinedLayers`), down (`LoraWeights`): The layers. Their biases are not trained.
        scalings (`tuple[float, float, float]`): What each adapter is multiplied by: that of gate, up and down.
    Returns:
        `torch.Tensor`: Output `[..., K]`. Gradients reach x, and every A and B.
    Source:
        SwiGLU, arXiv:2002.05202, equation 6.
    """
    *inner_scalings, down_scaling = scalings
    parameters = [part.weight for layer in gate_and_up.layers for part in (layer.lora_a, layer.lora_b)]
    gu_TD: Any = _GateUp.apply(x, *parameters, gate_and_up, inner_scalings)
    shape = *x.shape[:-1], down.base.out_features
    if gu_TD.grad_fn is None:  # nothing before down wants a gradient, so nothing was kept
        m_TI = silu_product(*gate_and_up.split(gu_TD))
        return apply_lora_linear(m_TI, down, down_scaling).view(shape)
    return _Down.apply(gu_TD, down.lora_a.weight, down.lora_b.weight, down, down_scaling, gu_TD.grad_fn, shape)

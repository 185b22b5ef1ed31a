"""The gated MLP of Llama and its kin, adapters included, as one function: y = down(silu(gate(x)) * up(x)).

Layer by layer, autograd keeps four tensors of the wide inner size: what gate puts out, its silu, what up puts out, and
their product, which down reads. Here it keeps two, and makes the others again in the backward, which costs a pass over
each. Gate and up read the same input, so their gradients for it are added where the first lies, by the product itself.

The forward has the bits of the three layers and of torch between them (`lora_linear.py`).

Shape suffixes: T tokens, K hidden size, I inner size, R rank.
"""

from __future__ import annotations

import torch
from torch import nn

from .lora_linear import LoraWeights, backward_through_b, backward_to_b, backward_to_input, forward_product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_a, gate_b, up_a, up_b, down_a, down_b, layers, scalings):
        gate, up, down = layers
        gate_scaling, up_scaling, down_scaling = scalings
        g, gate_h = forward_product(x, gate, gate_a, gate_b, gate_scaling)
        u, up_h = forward_product(x, up, up_a, up_b, up_scaling)
        y, down_h = forward_product(nn.functional.silu(g).mul_(u), down, down_a, down_b, down_scaling)
        ctx.save_for_backward(x, g, u, gate_h, up_h, down_h)
        ctx.layers, ctx.scalings = layers, scalings
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up, down = ctx.layers
        gate_scaling, up_scaling, down_scaling = ctx.scalings
        x, g, u, gate_h, up_h, down_h = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:7]
        grads = [None] * 6  # of A and B of gate, up and down
        x_TK, g_TI, u_TI, dy_TK = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, g, u, dy))

        silu_TI = nn.functional.silu(g_TI)
        dh_TR = backward_through_b(dy_TK, down, down_scaling)
        if needs[4]:
            grads[4] = dh_TR.t().mm(silu_TI * u_TI)
        if needs[5]:
            grads[5] = backward_to_b(dy_TK, down_h, down_scaling)
        dm_TI = backward_to_input(dy_TK, dh_TR, down)
        du_TI = silu_TI.mul_(dm_TI)
        dg_TI = torch.ops.aten.silu_backward(dm_TI.mul_(u_TI), g_TI)

        dx = None
        for index, (d_TI, layer, h_TR, scaling) in enumerate(
            ((dg_TI, gate, gate_h, gate_scaling), (du_TI, up, up_h, up_scaling))
        ):
            if needs[2 * index + 1]:
                grads[2 * index + 1] = backward_to_b(d_TI, h_TR, scaling)
            if needs_x or needs[2 * index]:
                dh_TR = backward_through_b(d_TI, layer, scaling)
            if needs[2 * index]:
                grads[2 * index] = dh_TR.t().mm(x_TK)
            if needs_x:
                dx = backward_to_input(d_TI, dh_TR, layer, dx)
        return (None if dx is None else dx.view(x.shape), *grads, None, None)


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
    parameters = [part.weight for layer in layers for part in (layer.lora_a, layer.lora_b)]
    return _SwiGLU.apply(x, *parameters, layers, scalings)

"""silu(g) * u and its gradients, each in one pass over memory.

Between the products of a gated MLP lie a few operations on tensors of its wide inner size. Each reads and writes all of
it, so their time is that of memory: torch takes five passes for the gradients, here it is one.

    forward     m = silu(g) u                  silu(g) = g sigmoid(g)
    backward    du = silu(g) dm                dg = dm u silu'(g),  silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))

**The same numbers.** Torch computes each step in float32 and rounds it to the dtype. The kernels round where it rounds:
silu(g) before it is multiplied, and dm u before it is. What is left is the last bit of an exponential in float32, which
seldom reaches a 16-bit result. The backward's kernel can write m as well, which the adapter of what reads m needs.

**Halves.** Layers that are one product put out g and u side by side, as one matrix, and their gradients are written
side by side as well, in the place of g and u if nobody reads those any more.

`silu_product` and `write_gradients` choose: the kernels on GPUs that have Triton, the operations of torch, which
are their definition, anywhere else.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .trial import OtherNumbers, tried


def silu_product(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return m = silu(g) u for g and u of one shape, contiguous, or halves `[S, I]` of one matrix."""
    kernels = _find_kernels(g.device) if g.is_cuda else None
    return kernels.silu_product(g, u) if kernels else silu_product_in_parts(g, u)


class SiluOfHalves(torch.autograd.Function):
    """m = silu(g) u for y `[S, 2 I]`, which is g and u side by side and all that is kept."""

    @staticmethod
    def forward(ctx, y_SI2: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_SI2)
        return silu_product(*y_SI2.chunk(2, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dm_SI: torch.Tensor) -> torch.Tensor:
        (y_SI2,) = ctx.saved_tensors
        dy_SI2 = torch.empty_like(y_SI2)
        write_gradients(dm_SI.contiguous(), *y_SI2.chunk(2, dim=1), *dy_SI2.chunk(2, dim=1))
        return dy_SI2


def write_gradients(
    dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, dg: torch.Tensor, du: torch.Tensor, make_m: bool = False
) -> None:
    """Write dg and du, for a dm `[S, I]` that is contiguous.

    Args:
        dm (`torch.Tensor`), g (`torch.Tensor`), u (`torch.Tensor`): What is given.
        dg (`torch.Tensor`), du (`torch.Tensor`): What is written: laid out as g and u are, or g and u themselves.
        make_m (`bool`): Write m, which the forward has not kept, in the place of dm.
    """
    kernels = _find_kernels(g.device) if g.is_cuda else None
    (kernels.write_gradients if kernels else write_gradients_in_parts)(dm, g, u, dg, du, make_m)


def silu_product_in_parts(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return what `silu_product` does, by torch's operations."""
    return nn.functional.silu(g).mul_(u)


def write_gradients_in_parts(
    dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, dg: torch.Tensor, du: torch.Tensor, make_m: bool = False
) -> None:
    """Write what `write_gradients` does, by torch's operations."""
    silu, dsilu = nn.functional.silu(g), dm * u
    m = silu * u if make_m else None
    torch.mul(dm, silu, out=du)
    torch.ops.aten.silu_backward.grad_input(dsilu, g, grad_input=dg)
    if m is not None:
        dm.copy_(m)


@tried("SwiGLU takes several passes over memory instead of one.")
def _find_kernels(device: torch.device) -> ModuleType:
    """Return the kernels if they give torch's numbers on this device."""
    from . import silu_product_triton as kernels

    g = torch.linspace(-20, 20, 3004, device=device)  # rows of which begin at multiples of 16 bytes
    u, dm = g.flip(0), g.roll(1000)
    theirs = [silu_product_in_parts(g, u), *(torch.empty_like(g) for _ in range(2)), dm.clone()]
    write_gradients_in_parts(theirs[3], g, u, theirs[1], theirs[2], True)
    mine = [kernels.silu_product(g, u), *(torch.empty_like(g) for _ in range(2)), dm.clone()]
    kernels.write_gradients(mine[3], g, u, mine[1], mine[2], True)
    for _ in range(2):  # launched anew, and again
        dm2, (g2, u2) = dm.repeat(2, 1), torch.cat([g, u]).repeat(2, 1).chunk(2, dim=1)
        m2 = kernels.silu_product(g2, u2)
        kernels.write_gradients(dm2, g2, u2, g2, u2, True)
        if not all(torch.equal(a, b.repeat(2, 1)) for a, b in zip([m2, g2, u2, dm2], mine, strict=True)):
            raise OtherNumbers("Halves of matrices are not treated as whole ones are.")
    # An exponential, a division and some products, each exact to two units in the last place; dg may cancel.
    bounds = [16 * torch.finfo(g.dtype).eps * (number.abs() + (dm * u).abs()) for number in theirs]
    if not all(((a - b).abs() <= bound).all() for a, b, bound in zip(mine, theirs, bounds, strict=True)):
        raise OtherNumbers("Its numbers are not those of torch on this device.")
    return kernels

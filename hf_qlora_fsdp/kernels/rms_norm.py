"""RMSNorm whose weight is not trained, in one pass over memory each way.

Transformers computes it in six operations, which keep the input in float32 besides, and again as many for gradients.
Liger's kernel is one, but makes the weight's gradient as well, which with LoRA nobody asks for: partial sums over rows,
for which few programs walk through many rows each, at half of what memory gives.

    forward     r = 1 / sqrt(mean(x^2) + eps)      y = w round(x r)
    backward    dn = round(w dy)                   dx = r (dn - x r mean(dn x r))

**The same numbers.** Torch computes in float32 and rounds to the dtype where `round` stands; so do the kernels. What is
left is the order of the sums.

**What is kept** is x and r. The weight is fetched from its module again: FSDP has gathered it anew by then.

`normalize` and `differentiate` choose: the kernels on GPUs that have Triton, the operations of torch, which are their
definition, anywhere else.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .trial import OtherNumbers, tried


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm):
        y, r = normalize(x, norm.weight, norm.variance_epsilon)
        ctx.save_for_backward(x, r)
        ctx.norm = norm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, r = ctx.saved_tensors
        return differentiate(dy, x, ctx.norm.weight, r), None


def apply_rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Return what a norm puts out.

    Args:
        x (`torch.Tensor`): Input `[..., K]`, in the dtype of the weight.
        norm (`nn.Module`): Has `weight` `[K]`, which is not trained, and `variance_epsilon`.
    Returns:
        `torch.Tensor`: Output `[..., K]`. Gradients reach x.
    Source:
        RMSNorm, arXiv:1910.07467, equation 4.
    """
    y: Any = _RMSNorm.apply(x, norm)
    return y


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y `[..., K]`, and r `[...]` in float32."""
    kernels = _find_kernels(x.device, x.dtype) if x.is_cuda else None
    return (kernels.normalize if kernels and kernels.takes(x) else normalize_in_parts)(x, weight, eps)


def differentiate(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return dx `[..., K]`."""
    kernels = _find_kernels(x.device, x.dtype) if x.is_cuda else None
    return (kernels.differentiate if kernels and kernels.takes(x) else differentiate_in_parts)(dy, x, weight, r)


def normalize_in_parts(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `normalize` does, by torch's operations."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * r[..., None]).to(x.dtype), r


def differentiate_in_parts(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return what `differentiate` does, by torch's operations."""
    n, dn = x.float() * r[..., None], (weight * dy).float()
    return (r[..., None] * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype)


@tried("RMSNorm takes several passes over memory instead of one.")
def _find_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the kernels if they give torch's numbers on this device."""
    from . import rms_norm_triton as kernels

    eps, bits = 1e-5, 16 * torch.finfo(torch.float32).eps  # by which sums in another order may differ
    round_off = max(bits, 2 * torch.finfo(dtype).eps)
    for num_rows, width in ((7, 96), (3, 4096)):  # several rows a program, and one
        x = torch.linspace(-3, 3, num_rows * width, device=device).view(num_rows, width).to(dtype)
        dy, w = x.flip(0, 1) * 2, (x[0] + 5).contiguous()
        y, r = normalize_in_parts(x, w, eps)
        n, dn = x.float() * r[:, None], (w * dy).float()
        scale = r[:, None] * (dn.abs() + n.abs() * (dn * n).abs().mean(-1, keepdim=True))
        theirs, bounds = (y, r, differentiate_in_parts(dy, x, w, r)), (round_off * y.abs(), bits * r, round_off * scale)
        for _ in range(2):  # launched anew, and again
            mine = *kernels.normalize(x, w, eps), kernels.differentiate(dy, x, w, r)
            if not all(((a - b).abs() <= bound).all() for a, b, bound in zip(mine, theirs, bounds, strict=True)):
                raise OtherNumbers("Its numbers are not those of torch on this device.")
    return kernels

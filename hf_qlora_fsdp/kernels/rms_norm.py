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

Shape suffixes: T tokens, K hidden size.
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
        y_TK, r_T = normalize(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon)
        ctx.save_for_backward(x, r_T)
        ctx.norm = norm
        # A plain view of something made in here could not be changed in place by those who get it.
        return torch.ops.aten._unsafe_view(y_TK, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, r_T = ctx.saved_tensors
        dy_TK, x_TK = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x))
        return differentiate(dy_TK, x_TK, ctx.norm.weight, r_T).view(dy.shape), None


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


def normalize(x_TK: torch.Tensor, w_K: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y `[T, K]`, and r `[T]` in float32."""
    kernels = _find_kernels(x_TK.device, x_TK.dtype) if x_TK.is_cuda else None
    return (kernels.normalize if kernels and kernels.takes(x_TK) else normalize_in_parts)(x_TK, w_K, eps)


def differentiate(dy_TK: torch.Tensor, x_TK: torch.Tensor, w_K: torch.Tensor, r_T: torch.Tensor) -> torch.Tensor:
    """Return dx `[T, K]`."""
    kernels = _find_kernels(x_TK.device, x_TK.dtype) if x_TK.is_cuda else None
    return (kernels.differentiate if kernels and kernels.takes(x_TK) else differentiate_in_parts)(dy_TK, x_TK, w_K, r_T)


def normalize_in_parts(x_TK: torch.Tensor, w_K: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `normalize` does, by torch's operations."""
    wide_TK = x_TK.float()
    r_T = torch.rsqrt(wide_TK.pow(2).mean(-1) + eps)
    return w_K * (wide_TK * r_T[:, None]).to(x_TK.dtype), r_T


def differentiate_in_parts(
    dy_TK: torch.Tensor, x_TK: torch.Tensor, w_K: torch.Tensor, r_T: torch.Tensor
) -> torch.Tensor:
    """Return what `differentiate` does, by torch's operations."""
    r_T1 = r_T[:, None]
    n_TK, dn_TK = x_TK.float() * r_T1, (w_K * dy_TK).float()
    return (r_T1 * (dn_TK - n_TK * (dn_TK * n_TK).mean(-1, keepdim=True))).to(x_TK.dtype)


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

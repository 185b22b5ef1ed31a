"""The Triton kernels of `silu_product.py`.

This module needs triton, which comes with CUDA builds of torch and is no requirement: import it where it may be absent.

Shape suffixes: P elements of one program.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

ELEMENTS_PER_PROGRAM = 2048
NUM_WARPS = 4


@triton.jit
def _forward(g_ptr, u_ptr, m_ptr, numel, SIZE: tl.constexpr):
    index_P = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists_P = index_P < numel
    dtype = m_ptr.dtype.element_ty
    g_P = tl.load(g_ptr + index_P, mask=exists_P, other=0).to(tl.float32)
    u_P = tl.load(u_ptr + index_P, mask=exists_P, other=0).to(tl.float32)
    silu_P = (g_P / (1 + tl.exp(-g_P))).to(dtype).to(tl.float32)
    tl.store(m_ptr + index_P, (silu_P * u_P).to(dtype), mask=exists_P)


@triton.jit
def _backward(dm_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, numel, SIZE: tl.constexpr):
    index_P = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists_P = index_P < numel
    dtype = dg_ptr.dtype.element_ty
    dm_P = tl.load(dm_ptr + index_P, mask=exists_P, other=0).to(tl.float32)
    g_P = tl.load(g_ptr + index_P, mask=exists_P, other=0).to(tl.float32)
    u_P = tl.load(u_ptr + index_P, mask=exists_P, other=0).to(tl.float32)
    sigmoid_P = 1 / (1 + tl.exp(-g_P))
    silu_P = (g_P * sigmoid_P).to(dtype).to(tl.float32)
    dsilu_P = (dm_P * u_P).to(dtype).to(tl.float32)
    dg_P = dsilu_P * (sigmoid_P * (1 + g_P * (1 - sigmoid_P)))
    tl.store(dg_ptr + index_P, dg_P.to(dtype), mask=exists_P)
    tl.store(du_ptr + index_P, (silu_P * dm_P).to(dtype), mask=exists_P)


def silu_product(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return m, see `silu_product.py`."""
    m = torch.empty_like(g)
    with _on(g.device):
        _forward[(triton.cdiv(g.numel(), ELEMENTS_PER_PROGRAM),)](
            g, u, m, g.numel(), SIZE=ELEMENTS_PER_PROGRAM, num_warps=NUM_WARPS
        )
    return m


def silu_product_gradients(dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dg, and du in the memory of dm."""
    dg = torch.empty_like(g)
    with _on(g.device):
        _backward[(triton.cdiv(g.numel(), ELEMENTS_PER_PROGRAM),)](
            dm, g, u, dg, dm, g.numel(), SIZE=ELEMENTS_PER_PROGRAM, num_warps=NUM_WARPS
        )
    return dg, dm


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make a device the current one, on which triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)

"""The Triton kernels of `silu_product.py`.

This module needs triton, which comes with CUDA builds of torch and is no requirement: import it where it may be absent.

Matrices of equal shape, whose rows may be farther apart than they are long: halves of wider ones.

Shape suffixes: P elements of one program.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .launching import Launcher, on_device

ELEMENTS_PER_PROGRAM = 2048
NUM_WARPS = 4


@triton.jit
def _forward(g_ptr, u_ptr, m_ptr, width, stride, programs_per_row, SIZE: tl.constexpr):
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    column_P = (tl.program_id(0) % programs_per_row).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists_P, place_P = column_P < width, row * stride + column_P
    dtype = m_ptr.dtype.element_ty
    g_P = tl.load(g_ptr + place_P, mask=exists_P, other=0).to(tl.float32)
    u_P = tl.load(u_ptr + place_P, mask=exists_P, other=0).to(tl.float32)
    silu_P = (g_P / (1 + tl.exp(-g_P))).to(dtype).to(tl.float32)
    tl.store(m_ptr + row * width + column_P, (silu_P * u_P).to(dtype), mask=exists_P)


@triton.jit
def _backward(
    dm_ptr,
    g_ptr,
    u_ptr,
    dg_ptr,
    du_ptr,
    width,
    stride,
    programs_per_row,
    MAKE_M: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    column_P = (tl.program_id(0) % programs_per_row).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists_P, place_P = column_P < width, row * stride + column_P
    dtype = dg_ptr.dtype.element_ty
    dm_P = tl.load(dm_ptr + row * width + column_P, mask=exists_P, other=0).to(tl.float32)
    g_P = tl.load(g_ptr + place_P, mask=exists_P, other=0).to(tl.float32)
    u_P = tl.load(u_ptr + place_P, mask=exists_P, other=0).to(tl.float32)
    sigmoid_P = 1 / (1 + tl.exp(-g_P))
    silu_P = (g_P * sigmoid_P).to(dtype).to(tl.float32)
    dsilu_P = (dm_P * u_P).to(dtype).to(tl.float32)
    dg_P = dsilu_P * (sigmoid_P * (1 + g_P * (1 - sigmoid_P)))
    tl.store(dg_ptr + place_P, dg_P.to(dtype), mask=exists_P)
    tl.store(du_ptr + place_P, (silu_P * dm_P).to(dtype), mask=exists_P)
    if MAKE_M:
        tl.store(dm_ptr + row * width + column_P, (silu_P * u_P).to(dtype), mask=exists_P)


def silu_product(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return m, see `silu_product.py`."""
    m = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    _launch(_forward, g, g, u, m)
    return m


def write_gradients(
    dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, dg: torch.Tensor, du: torch.Tensor, make_m: bool
) -> None:
    """Write dg and du, see `silu_product.py`. A program reads what it needs before it writes in its place."""
    _launch(_backward, g, dm, g, u, dg, du, MAKE_M=make_m)


def _launch(kernel: Any, g: torch.Tensor, *tensors: torch.Tensor, **constants: int) -> None:
    """Run a kernel on tensors that are laid out like g, or contiguous."""
    rows, width, stride = (1, g.numel(), g.numel()) if g.is_contiguous() else (*g.shape, g.stride(0))
    if rows * width == 0:
        return
    programs_per_row = triton.cdiv(width, ELEMENTS_PER_PROGRAM)
    launch = _prepare(kernel, (width, stride, programs_per_row), g.dtype, g.device, **constants)
    with on_device(g.device):
        launch(rows * programs_per_row, *tensors)


@functools.lru_cache(256)
def _prepare(
    kernel: Any, numbers: tuple[int, int, int], dtype: torch.dtype, device: torch.device, **constants: int
) -> Launcher:
    """Return the launch of a kernel, which is compiled for each dtype and device."""
    # Fused as nvcc does for torch's kernels; left open, triton 3.9 warns.
    constants |= {"SIZE": ELEMENTS_PER_PROGRAM}
    return Launcher(kernel, numbers, constants, num_warps=NUM_WARPS, enable_fp_fusion=True)

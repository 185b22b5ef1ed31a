"""The Triton kernels of `rms_norm.py`: a program has one row, or some where they are short.

This module needs triton, which comes with CUDA builds of torch and is no requirement: import it where it may be absent.

Shape suffixes: R rows of one program, S its columns, a power of two.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .launching import Launcher, on_device

MOST_COLUMNS = 32768
"""A row is held in registers, between its sum and what is made of it."""
NUMBERS_PER_PROGRAM = 4096
NUMBERS_PER_WARP = 512


@triton.jit
def _normalize(
    x_ptr, w_ptr, y_ptr, r_ptr, num_rows, width, EPS: tl.constexpr, NUM_ROWS: tl.constexpr, SIZE: tl.constexpr
):
    row_R = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    column_S = tl.arange(0, SIZE)
    exists_RS = (row_R < num_rows)[:, None] & (column_S < width)[None, :]
    place_RS = row_R[:, None] * width + column_S[None, :]
    dtype = y_ptr.dtype.element_ty
    x_RS = tl.load(x_ptr + place_RS, mask=exists_RS, other=0).to(tl.float32)
    w_S = tl.load(w_ptr + column_S, mask=column_S < width, other=0).to(tl.float32)
    r_R = 1 / tl.sqrt(tl.sum(x_RS * x_RS, axis=1) / width + EPS)
    n_RS = (x_RS * r_R[:, None]).to(dtype).to(tl.float32)
    tl.store(y_ptr + place_RS, (w_S[None, :] * n_RS).to(dtype), mask=exists_RS)
    tl.store(r_ptr + row_R, r_R, mask=row_R < num_rows)


@triton.jit
def _differentiate(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, num_rows, width, NUM_ROWS: tl.constexpr, SIZE: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    column_S = tl.arange(0, SIZE)
    exists_RS = (row_R < num_rows)[:, None] & (column_S < width)[None, :]
    place_RS = row_R[:, None] * width + column_S[None, :]
    dtype = dx_ptr.dtype.element_ty
    dy_RS = tl.load(dy_ptr + place_RS, mask=exists_RS, other=0).to(tl.float32)
    x_RS = tl.load(x_ptr + place_RS, mask=exists_RS, other=0).to(tl.float32)
    w_S = tl.load(w_ptr + column_S, mask=column_S < width, other=0).to(tl.float32)
    r_R = tl.load(r_ptr + row_R, mask=row_R < num_rows, other=0)
    dn_RS = (w_S[None, :] * dy_RS).to(dtype).to(tl.float32)
    n_RS = x_RS * r_R[:, None]
    mean_R = tl.sum(dn_RS * n_RS, axis=1) / width
    dx_RS = r_R[:, None] * (dn_RS - n_RS * mean_R[:, None])
    tl.store(dx_ptr + place_RS, dx_RS.to(dtype), mask=exists_RS)


def takes(x: torch.Tensor) -> bool:
    """Return whether rows are not too long for a program, and there are some."""
    return x.numel() > 0 and x.shape[-1] <= MOST_COLUMNS


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and r, see `rms_norm.py`."""
    x = x.contiguous()
    y, r = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    num_programs, launch = _prepare(_normalize, r.numel(), x.shape[-1], x.dtype, x.device, EPS=eps)
    with on_device(x.device):
        launch(num_programs, x, weight, y, r)
    return y, r


def differentiate(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return dx, see `rms_norm.py`."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    num_programs, launch = _prepare(_differentiate, r.numel(), x.shape[-1], x.dtype, x.device)
    with on_device(x.device):
        launch(num_programs, dy, x, weight, r, dx)
    return dx


@functools.lru_cache(1024)
def _prepare(
    kernel: Any, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, **constants: float
) -> tuple[int, Launcher]:
    """Return how many programs of which launch do so many rows. A kernel is compiled for each dtype and device."""
    size = triton.next_power_of_2(width)
    rows = max(1, NUMBERS_PER_PROGRAM // size)
    num_warps = min(32, max(4, rows * size // NUMBERS_PER_WARP))
    numbers, constants = (num_rows, width), constants | {"NUM_ROWS": rows, "SIZE": size}
    launch = Launcher(kernel, numbers, constants, num_warps=num_warps, enable_fp_fusion=True)
    return triton.cdiv(num_rows, rows), launch

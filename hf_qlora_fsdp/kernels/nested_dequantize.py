"""A packed 4-bit weight becomes a 16-bit one in a single Triton kernel.

bitsandbytes takes three launches for a weight with double quantisation: the 8-bit scales to float32, the offset added
to them, the codes multiplied by them. Each has its Python, and the scales go through memory twice. Here a program reads
a few blocks of codes together with their scales, straight from the packed buffer, and writes the weights:

    absmax = map8[absmax8] * nested_absmax + offset          one a block of weights
    weight = map4[code] * absmax, rounded to the dtype       two a byte, the high half first

**Pieces.** Equal weights whose codes lie side by side, and their scales likewise (`experts/stacks.py`), are dequantised
as one. Each has nested scales and an offset of its own, which a block finds by the number of its piece.

**By rows.** Of a weight whose rows are whole blocks, some rows or columns can be made alone, and rows can be written
farther apart than they are long: a block of the result then comes from another place, or goes to one, which it finds by
its row.

**The same bits.** bitsandbytes rounds the first product to float32 before the offset is added, since that happens in
another kernel. A compiler would fuse the two into one multiply-add that rounds once; `enable_fp_fusion=False` forbids
it. (Weights below 1.2e-38 are the exception: bitsandbytes is compiled with flushing of subnormal numbers to zero.)

This module needs triton, which comes with CUDA builds of torch and is no requirement: import it where it may be absent.

Shape suffixes: N out_features, K in_features, P pieces, B blocks of one program, H bytes of a block, W weights of a
block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
import triton
import triton.language as tl

from .launching import Launcher, on_device

WEIGHTS_PER_PROGRAM = 2048
"""Eight bytes of codes a thread, so that enough loads are under way to hide the latency of memory."""
NUM_WARPS = 4


@triton.jit
def _dequantize(
    packed_ptr,
    out_ptr,
    map4_ptr,
    map8_ptr,
    numel,
    codes_bytes,
    codes_start,
    absmax_start,
    nested_start,
    offset_start,
    blocks_per_piece,
    nested_per_piece,
    first_block,
    blocks_per_row,
    blocks_per_whole_row,
    out_stride,
    BY_ROWS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    block_B = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    exists_B = block_B * BLOCKSIZE < numel
    place_BW = block_B[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    is_weight_BW = place_BW < numel
    if BY_ROWS:
        row_B = block_B // blocks_per_row
        in_row_B = block_B - row_B * blocks_per_row
        place_BW = (row_B * out_stride + in_row_B * BLOCKSIZE)[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
        block_B = first_block + row_B * blocks_per_whole_row + in_row_B
    if DOUBLE_QUANT:
        nested_ptr = (packed_ptr + nested_start).to(tl.pointer_type(tl.float32))
        offset_ptr = (packed_ptr + offset_start).to(tl.pointer_type(tl.float32))
        absmax8_B = tl.load(packed_ptr + absmax_start + block_B, mask=exists_B, other=0).to(tl.int32)
        piece_B = block_B // blocks_per_piece
        inner_B = block_B - piece_B * blocks_per_piece
        place_B = piece_B * nested_per_piece + inner_B // NESTED_BLOCKSIZE
        nested_B = tl.load(nested_ptr + place_B, mask=exists_B, other=0.0)
        offset_B = tl.load(offset_ptr + piece_B, mask=exists_B, other=0.0)
        absmax_B = tl.load(map8_ptr + absmax8_B) * nested_B + offset_B
    else:
        absmax_ptr = (packed_ptr + absmax_start).to(tl.pointer_type(tl.float32))
        absmax_B = tl.load(absmax_ptr + block_B, mask=exists_B, other=0.0)
    byte_BH = block_B[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    codes_BH = tl.load(packed_ptr + codes_start + byte_BH, mask=byte_BH < codes_bytes, other=0).to(tl.int32)
    high_BH = tl.load(map4_ptr + (codes_BH >> 4)) * absmax_B[:, None]
    low_BH = tl.load(map4_ptr + (codes_BH & 15)) * absmax_B[:, None]
    weights_BW = tl.interleave(high_BH, low_BH).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place_BW, weights_BW, mask=is_weight_BW)


def dequantize_packed(
    packed: torch.Tensor,
    layout: Any,
    dtype: torch.dtype,
    rows: slice = slice(None),
    columns: slice = slice(None),
    out: torch.Tensor | None = None,
    *,
    nested_blocksize: int,
) -> torch.Tensor:
    """Return the weight of a packed buffer, or a part of it.

    Args:
        packed (`torch.Tensor`): The buffer, contiguous, in any dtype.
        layout (`PackedLayout`): What lies where in it.
        dtype (`torch.dtype`): Dtype of the result.
        rows (`slice`), columns (`slice`, *optional*): Which part, whole blocks of rows that are whole blocks.
        out (`torch.Tensor`, *optional*): Where it is written: a matrix of its shape, whose rows may be farther apart
            than they are long if they are whole blocks.
        nested_blocksize (`int`): Scales that share one second-level scale.
    Returns:
        `torch.Tensor`: The weight `[N, K]`, on the device of the buffer.
    """
    stride = 0 if out is None or out.is_contiguous() else out.stride(0)
    part = rows.start, rows.stop, columns.start, columns.stop
    shape, num_programs, launch = _prepare(layout, dtype, part, stride, nested_blocksize, packed.device)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    map4, map8 = _load_maps(layout.quant_type, packed.device)
    with on_device(packed.device):
        launch(num_programs, packed.view(torch.uint8), out, map4, map8)
    return out


@functools.lru_cache(4096)
def _prepare(
    layout: Any,
    dtype: torch.dtype,
    part: tuple[int | None, int | None, int | None, int | None],
    stride: int,
    nested_blocksize: int,
    device: torch.device,
) -> tuple[tuple[int, int], int, Launcher]:
    """Return the shape of a part of a weight, and what fills it: how many programs of which launch.

    Args:
        part (`tuple`): Bounds of its rows and columns.
        stride (`int`): How far apart rows are written, 0 for one after the other.
        layout, dtype, nested_blocksize, device: As for `dequantize_packed`. A kernel is compiled for each dtype and
            device.
    """
    rows, columns = slice(*part[:2]), slice(*part[2:])
    shape, by_rows = layout.part(rows, columns).shape, None
    if stride or any(bound is not None for bound in part):
        in_row, size = layout.shape[1] // layout.blocksize, layout.blocksize
        first_block = (rows.start or 0) * in_row + (columns.start or 0) // size
        by_rows = first_block, shape[1] // size, in_row, stride or shape[1]
    starts = (0, *layout.offsets[:3])
    return shape, *_prepare_launch(layout, math.prod(shape), 1, starts, nested_blocksize, by_rows)


def dequantize_run(
    packed: torch.Tensor,
    layout: Any,
    num_pieces: int,
    starts: Sequence[int],
    dtype: torch.dtype,
    *,
    nested_blocksize: int,
) -> torch.Tensor:
    """Return weights whose codes lie side by side, and their scales likewise.

    Args:
        packed (`torch.Tensor`): The buffer that they lie in, contiguous, in any dtype.
        layout (`PackedLayout`): Of each of them. Several have whole blocks.
        num_pieces (`int`): How many there are.
        starts (`Sequence[int]`): First byte of their codes, absmax, nested absmax and offsets.
        dtype (`torch.dtype`): Dtype of the result.
        nested_blocksize (`int`): Scales that share one second-level scale.
    Returns:
        `torch.Tensor`: The weights `[P, N, K]`, on the device of the buffer.
    """
    out = torch.empty((num_pieces, *layout.shape), dtype=dtype, device=packed.device)
    num_programs, launch = _prepare_launch(layout, out.numel(), num_pieces, starts, nested_blocksize, None)
    map4, map8 = _load_maps(layout.quant_type, packed.device)
    with on_device(packed.device):
        launch(num_programs, packed.view(torch.uint8), out, map4, map8)
    return out


def _prepare_launch(
    layout: Any,
    numel: int,
    num_pieces: int,
    starts: Sequence[int],
    nested_blocksize: int,
    by_rows: tuple[int, int, int, int] | None,
) -> tuple[int, Launcher]:
    """Return how many programs of which launch write so many weights.

    Args:
        by_rows (`tuple[int, int, int, int]`, *optional*): Where they are written row by row: the first block, the
            blocks of a row of the result and of a row of the weight, and how far apart rows are in the result.
        layout, num_pieces, starts, nested_blocksize: As for `dequantize_run`.
    """
    blocksize = layout.blocksize
    num_blocks = max(1, WEIGHTS_PER_PROGRAM // blocksize)
    numbers = (numel, num_pieces * layout.codes_bytes, *starts, layout.num_blocks, layout.num_nested_blocks)
    constants = {
        "BY_ROWS": by_rows is not None,
        "DOUBLE_QUANT": layout.double_quant,
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": nested_blocksize,
        "NUM_BLOCKS": num_blocks,
    }
    numbers = (*numbers, *(by_rows or (0, 1, 1, 0)))
    launch = Launcher(_dequantize, numbers, constants, num_warps=NUM_WARPS, enable_fp_fusion=False)
    return -(-numel // (num_blocks * blocksize)), launch


@functools.cache
def _load_maps(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 16 values of the 4-bit type and the 256 of bitsandbytes' signed dynamic 8-bit type."""
    map4 = bnb_functional.get_4bit_type(quant_type, device="cpu")
    if quant_type == "fp4":
        map4[8] = -0.0  # the sign is a bit of its own, for zero too (bitsandbytes csrc/kernels.cu, dDequantizeFP4Tree)
    return map4.to(device), bnb_functional.create_dynamic_map().to(device)

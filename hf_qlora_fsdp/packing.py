"""A 4-bit weight as one buffer of bytes.

bitsandbytes keeps a quantised weight in two places: the 4-bit codes in the `Parameter`, and the block scales in a
`quant_state` beside it, which no sharding framework sees. The scales are therefore replicated on every card and never
offloaded: 1.1 GB for a 70B model with double quantisation, 4.3 GB without. Here a weight is **one** flat buffer that
holds all it takes to dequantise it, so FSDP shards, gathers and offloads codes and scales as a single parameter:

    | codes, two a byte | absmax, one a block | nested absmax (fp32) | offset (fp32) |
                          uint8 with double quantisation: the last two parts exist only then
                          float32 without

Every part starts at a multiple of 16 bytes. `PackedLayout` is the arithmetic of that picture; nothing but the shape
and the kind of quantisation is needed for it, so every rank knows every layout without being told.

**The storage dtype.** The buffer is viewed, byte for byte, in the parameter dtype of the mixed-precision policy
(`[num_bytes / itemsize, 1]`). FSDP casts parameters to that dtype before it gathers them; a view in the same dtype is
left alone, while any other pairing would be cast *as numbers* and train on garbage without an error. (On GPUs it is
left alone only because `compat/torch_gather_bytes.py` sees to it, and `mesh.check_gathering` checks that it is so.)

**Pieces.** In 16 bits a weight is four times as large, 448 MiB for one of Llama-2-70B's [28672, 8192], and it is there
while a layer computes, at the peak of a step. So a large one is made a piece at a time: some rows where rows give
columns of the result, some columns where they do, so that no sum is put together of pieces.

The numbers are those of bitsandbytes, bit for bit: the same quantisation is called at load, the same dequantisation in
the forward, and the tests compare both with `bitsandbytes.nn.Linear4bit`.

Shape suffixes: N out_features, K in_features, M elements of the packed buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

from .kernels.trial import OtherNumbers, tried

ALIGNMENT = 16
NESTED_BLOCKSIZE = 256
"""Scales that share one second-level scale: QLoRA, arXiv:2305.14314, section 3 (double quantisation)."""
PIECE_BYTES = 1 << 28
"""Of a weight in 16 bits, made at a time: as much as of experts (`experts/layers.py`)."""
PIECE_STEP = 2048
"""Pieces have a multiple of so many rows or columns if PIECE_BYTES has room, so that products with them fill a card.

With 2048 tokens, 2048 k rows are 16 x 8 k tiles of 128 x 256, and take k rounds of an H100's 132 processors or fewer:
97 % of them work, whatever k, and with 4096 tokens as well. A quarter of [28672, K] is 16 x 28 tiles, which take four
rounds: 85 %.
"""
ALL = slice(None)


@dataclass(frozen=True)
class PackedLayout:
    """Where codes and scales lie in the packed buffer of one weight.

    Args:
        shape (`tuple[int, int]`): Shape `[N, K]` of the weight.
        quant_type (`str`): `"nf4"` or `"fp4"`.
        double_quant (`bool`): Whether the block scales are quantised to 8 bits themselves.
        blocksize (`int`): Weights that share one scale.
    """

    shape: tuple[int, int]
    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def has_whole_rows(self) -> bool:
        """Whether each row consists of whole blocks, so that some rows, or blocks of each, can be made alone."""
        return self.shape[1] % self.blocksize == 0

    @property
    def num_blocks(self) -> int:
        return math.ceil(self.numel / self.blocksize)

    @property
    def num_nested_blocks(self) -> int:
        return math.ceil(self.num_blocks / NESTED_BLOCKSIZE) if self.double_quant else 0

    @property
    def codes_bytes(self) -> int:
        return math.ceil(self.numel / 2)

    @property
    def absmax_bytes(self) -> int:
        return self.num_blocks * (1 if self.double_quant else 4)

    @functools.cached_property
    def offsets(self) -> tuple[int, int, int, int]:
        """Return the first byte of absmax, nested absmax and offset, and the size of the whole buffer."""
        absmax = align(self.codes_bytes)
        nested = align(absmax + self.absmax_bytes)
        offset = align(nested + 4 * self.num_nested_blocks)
        return absmax, nested, offset, align(offset + 4) if self.double_quant else nested

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1]

    def packed_shape(self, storage_dtype: torch.dtype) -> tuple[int, int]:
        """Return the shape `[M, 1]` of the buffer viewed in `storage_dtype`."""
        return self.num_bytes // storage_dtype.itemsize, 1

    def row_pieces(self, dtype: torch.dtype) -> list[slice]:
        """Return the rows that are dequantised at a time: `[ALL]` if they fit into PIECE_BYTES."""
        return self._cut(0, 1, dtype)

    def column_pieces(self, dtype: torch.dtype) -> list[slice]:
        """Return the columns that are dequantised at a time, likewise."""
        return self._cut(1, self.blocksize, dtype)

    def _cut(self, dim: int, unit: int, dtype: torch.dtype) -> list[slice]:
        """Cut one dimension evenly into multiples of a unit. Where rows are no whole blocks, nothing can be cut."""
        size = self.shape[dim]
        most = PIECE_BYTES // (self.shape[1 - dim] * dtype.itemsize)
        if size <= most or not self.has_whole_rows:
            return [ALL]
        step = unit
        while 2 * step <= min(most, PIECE_STEP):
            step *= 2
        num_steps, steps_at_a_time = math.ceil(size / step), max(1, most // step)
        piece = step * math.ceil(num_steps / math.ceil(num_steps / steps_at_a_time))
        return [slice(start, min(start + piece, size)) for start in range(0, size, piece)]

    def part(self, rows: slice, columns: slice) -> PackedLayout:
        """Return the layout that these rows and columns would have by themselves."""
        shape = len(range(self.shape[0])[rows]), len(range(self.shape[1])[columns])
        return self if shape == self.shape else replace(self, shape=shape)


def align(num_bytes: int) -> int:
    """Return where the next part of a packed buffer begins that has so many bytes before it."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def quantize(w_NK: torch.Tensor, layout: PackedLayout, storage_dtype: torch.dtype) -> torch.Tensor:
    """Quantise a weight and pack it.

    Args:
        w_NK (`torch.Tensor`): Weight `[N, K]` in the parameter dtype, on the device that shall quantise it.
        layout (`PackedLayout`): Its layout.
        storage_dtype (`torch.dtype`): Dtype the buffer is viewed in.
    Returns:
        `torch.Tensor`: Packed buffer `[M, 1]` on the same device.
    """
    codes, state = bnb_functional.quantize_4bit(
        w_NK.contiguous(),
        blocksize=layout.blocksize,
        compress_statistics=layout.double_quant,
        quant_type=layout.quant_type,
    )
    return pack(codes, state, layout, storage_dtype)


def pack(
    codes: torch.Tensor, state: bnb_functional.QuantState, layout: PackedLayout, storage_dtype: torch.dtype
) -> torch.Tensor:
    """Lay codes and scales of bitsandbytes into one buffer, byte for byte; nothing is quantised again.

    Args:
        codes (`torch.Tensor`): The 4-bit codes, in any storage dtype.
        state (`bitsandbytes.functional.QuantState`): The scales.
        layout (`PackedLayout`): The layout that codes and scales must fit.
        storage_dtype (`torch.dtype`): Dtype the buffer is viewed in.
    Returns:
        `torch.Tensor`: Packed buffer `[M, 1]` on the device of `codes`.
    Raises:
        ValueError: Codes or scales do not have the size that the layout asks for, or use another 8-bit map.
    """
    absmax_start, nested_start, offset_start, num_bytes = layout.offsets
    parts = [(0, codes, layout.codes_bytes), (absmax_start, state.absmax, layout.absmax_bytes)]
    if layout.double_quant:
        if not torch.equal(state.state2.code.float().cpu(), dynamic_map(torch.device("cpu"))):
            raise ValueError(
                "The checkpoint's nested scales use an 8-bit map of their own. Only the standard one of bitsandbytes "
                "can be read here. Load the 16-bit checkpoint instead; it is quantised while it is read."
            )
        parts += [
            (nested_start, state.state2.absmax.float(), 4 * layout.num_nested_blocks),
            (offset_start, state.offset.float().reshape(1), 4),
        ]
    packed = torch.zeros(num_bytes, dtype=torch.uint8, device=codes.device)
    for start, part, expected_bytes in parts:
        raw = part.detach().contiguous().reshape(-1).view(torch.uint8)
        if raw.numel() != expected_bytes:
            raise ValueError(
                f"A quantised weight of shape {list(layout.shape)} ({layout.quant_type}, "
                f"double_quant={layout.double_quant}) needs {expected_bytes:,} bytes where {raw.numel():,} were given. "
                "The checkpoint and its config.json do not belong together; download them again from one revision."
            )
        packed[start : start + expected_bytes] = raw
    return packed.view(storage_dtype).view(-1, 1)


def unpack(packed: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the codes `[codes_bytes]` (uint8) and the block scales `[num_blocks]` (fp32)."""
    codes, absmax, nested, offset = _view_parts(packed, layout)
    if layout.double_quant:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, nested, dynamic_map(packed.device), NESTED_BLOCKSIZE, torch.float32
        )
        absmax += offset
    return codes, absmax


def unpack_piece(
    packed: torch.Tensor, layout: PackedLayout, rows: slice, columns: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `unpack` does, of some rows and columns alone. Both are whole blocks."""
    codes, absmax, nested, offset = _view_parts(packed, layout)
    (num_rows, num_columns), size = layout.shape, layout.blocksize
    start, stop, _ = columns.indices(num_columns)
    blocks = slice(start // size, stop // size)
    codes = codes.view(num_rows, -1)[rows, start // 2 : stop // 2]
    absmax = absmax.view(num_rows, -1)[rows, blocks]
    if layout.double_quant:
        of_row = torch.arange(num_rows, device=packed.device)[rows, None] * (num_columns // size)
        place = (of_row + torch.arange(num_columns // size, device=packed.device)[blocks]) // NESTED_BLOCKSIZE
        absmax = dynamic_map(packed.device)[absmax.int()].mul_(nested[place]).add_(offset)
    return codes.contiguous().view(-1), absmax.contiguous().view(-1)


def _view_parts(packed: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, ...]:
    """Return codes, absmax, nested absmax and offset as they are stored; the last two are empty if there are none."""
    absmax_start, nested_start, offset_start, _ = layout.offsets
    raw = packed.detach().reshape(-1).view(torch.uint8)
    absmax = raw[absmax_start : absmax_start + layout.absmax_bytes]
    nested = raw[nested_start : nested_start + 4 * layout.num_nested_blocks].view(torch.float32)
    offset = raw[offset_start : offset_start + 4 * layout.double_quant].view(torch.float32)
    return raw[: layout.codes_bytes], absmax if layout.double_quant else absmax.view(torch.float32), nested, offset


def dequantize(
    packed: torch.Tensor,
    layout: PackedLayout,
    dtype: torch.dtype,
    rows: slice = ALL,
    columns: slice = ALL,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weight `[N, K]` from its packed buffer, or a piece of it: in one kernel on GPUs that have Triton.

    Args:
        packed (`torch.Tensor`): The buffer `[M, 1]`.
        layout (`PackedLayout`): Its layout.
        dtype (`torch.dtype`): Dtype of the result.
        rows (`slice`, *optional*): Which rows, one of `layout.row_pieces`. The bits are those that they have in all.
        columns (`slice`, *optional*): Which columns, one of `layout.column_pieces`.
        out (`torch.Tensor`, *optional*): Where it is written and returned: a matrix of its shape and dtype, whose rows
            may be farther apart than they are long.
    """
    if packed.is_cuda:
        kind = layout.quant_type, layout.double_quant, layout.blocksize
        by_rows = not rows == columns == ALL or (out is not None and not out.is_contiguous())
        if (not by_rows or layout.has_whole_rows) and (
            fused := _find_fused(packed.device, dtype, *kind, by_rows=by_rows)
        ):
            return fused(packed.detach(), layout, dtype, rows, columns, out)
    weight = dequantize_in_parts(packed, layout, dtype, rows, columns)
    return weight if out is None else out.copy_(weight)


def dequantize_in_parts(
    packed: torch.Tensor, layout: PackedLayout, dtype: torch.dtype, rows: slice = ALL, columns: slice = ALL
) -> torch.Tensor:
    """Return what `dequantize` does, by the kernels of bitsandbytes: first the scales, then the codes."""
    is_whole, part = rows == columns == ALL, layout.part(rows, columns)
    codes, absmax = unpack(packed, layout) if is_whole else unpack_piece(packed, layout, rows, columns)
    # In rows of one block: on CPUs with AVX512, bitsandbytes 0.50 takes wrong scales, without a word, where a row does
    # not consist of whole blocks.
    blocks = (part.num_blocks, part.blocksize)
    missing = blocks[0] * blocks[1] // 2 - codes.numel()
    if missing:  # the last block is short
        codes = nn.functional.pad(codes, (0, missing))
    weight = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), absmax, part.blocksize, part.quant_type, blocks, dtype
    )
    return weight.view(-1)[: part.numel].view(part.shape)


@tried("4-bit weights are dequantised by three kernels each instead of a fused one.")
def _find_fused(
    device: torch.device, dtype: torch.dtype, *kind: Any, by_rows: bool = False
) -> Callable[..., torch.Tensor]:
    """Return the fused kernel if it gives the bits of bitsandbytes on this device.

    For each dtype and kind of layout, and for results that are written row by row: Triton compiles another kernel for
    each.
    """
    from .kernels.nested_dequantize import dequantize_packed

    fused = functools.partial(dequantize_packed, nested_blocksize=NESTED_BLOCKSIZE)
    layout, piece = PackedLayout((96, 70), *kind), (ALL, ALL)
    if by_rows:  # the second half of each row
        size = layout.blocksize
        layout, piece = replace(layout, shape=(300, 2 * size)), (slice(1, 300), slice(size, 2 * size))
    probe = quantize(torch.linspace(-1, 1, layout.numel, device=device).view(layout.shape), layout, torch.float32)
    expected = dequantize_in_parts(probe, layout, dtype, *piece)
    wider = torch.full((expected.shape[0], expected.shape[1] + 32), 9, dtype=dtype, device=device)
    computed = [fused(probe, layout, dtype, *piece, None) for _ in range(2)]  # launched anew, and again
    if by_rows:
        computed.append(fused(probe, layout, dtype, *piece, wider[:, : expected.shape[1]]))
    if not all(torch.equal(one, expected) for one in computed) or not (wider[:, expected.shape[1] :] == 9).all():
        raise OtherNumbers("Its numbers are not those of bitsandbytes on this device.")
    return fused


@functools.lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 values of bitsandbytes' signed dynamic 8-bit type (arXiv:2110.02861, section 2.1)."""
    return bnb_functional.create_dynamic_map().to(device)

"""The 4-bit weights of many experts as one buffer of bytes.

A layer of experts is the same small network many times over: 8 in Mixtral, 128 in Qwen3-MoE. With a buffer for each
matrix (`packing.py`), FSDP would handle hundreds of parameters a layer, and dequantising would be hundreds of launches.
So the matrices of one projection are packed side by side, part by part:

    | codes of piece 0, 1, 2 ... | absmax of 0, 1, 2 ... | nested absmax of 0, 1, 2 ... | offset of 0, 1, 2 ... |

Whatever run of neighbours is needed, its codes lie together and so do its scales: it is dequantised by one call, with
nothing copied, and on GPUs that have Triton by one kernel (`kernels/nested_dequantize.py`).
The buffer is flat, `[M, 1]`, so ranks get even shares of it whatever the number of experts.

A **piece** is what a dense layer would call a linear layer: the gate, the up or the down projection of one expert. Each
is quantised for itself, offset of its nested scales included, and so has the very bytes that bitsandbytes gives the
same matrix in a `Linear4bit`. Checkpoints that were quantised expert by expert are therefore taken over byte for byte.

Shape suffixes: P pieces, N and K the rows and columns of one, B its blocks, M elements of the packed buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.trial import OtherNumbers, tried
from ..packing import NESTED_BLOCKSIZE, PackedLayout, align, dynamic_map, quantize


@dataclass(frozen=True)
class StackLayout:
    """Where the codes and scales of equal matrices lie in their common buffer.

    Args:
        piece (`PackedLayout`): Shape `[N, K]` and quantisation of each matrix.
        num_pieces (`int`): How many there are.
    Raises:
        ValueError: The matrices do not consist of whole blocks.
    """

    piece: PackedLayout
    num_pieces: int

    def __post_init__(self) -> None:
        if self.piece.numel % self.piece.blocksize:
            raise ValueError(
                f"An expert's matrix of shape {list(self.piece.shape)} is not a whole number of blocks of "
                f"{self.piece.blocksize} weights, so experts cannot be dequantised side by side. Use a blocksize that "
                f"divides {self.piece.numel:,}."
            )

    @functools.cached_property
    def part_bytes(self) -> tuple[int, int, int, int]:
        """Return the size of one piece's codes, absmax, nested absmax and offset."""
        piece = self.piece
        return piece.codes_bytes, piece.absmax_bytes, 4 * piece.num_nested_blocks, 4 if piece.double_quant else 0

    @functools.cached_property
    def part_starts(self) -> tuple[int, ...]:
        """Return the first byte of codes, absmax, nested absmax and offsets, and the size of the whole buffer."""
        starts = [0]
        for num_bytes in self.part_bytes:
            starts.append(align(starts[-1] + self.num_pieces * num_bytes))
        return tuple(starts)

    @property
    def num_bytes(self) -> int:
        return self.part_starts[-1]

    def packed_shape(self, storage_dtype: torch.dtype) -> tuple[int, int]:
        """Return the shape `[M, 1]` of the buffer viewed in `storage_dtype`."""
        return self.num_bytes // storage_dtype.itemsize, 1


def insert_piece(stack: torch.Tensor, index: int, packed: torch.Tensor, layout: StackLayout) -> None:
    """Copy a packed matrix to its place, byte for byte.

    Args:
        stack (`torch.Tensor`): The buffer `[M, 1]` of all.
        index (`int`): Which piece.
        packed (`torch.Tensor`): What `packing.quantize` or `packing.pack` made of it.
        layout (`StackLayout`): The layout of `stack`.
    """
    raw = _bytes_of(packed)
    for own, (start, num_bytes) in zip(_parts(stack, index, index + 1, layout), _parts_of_one(layout), strict=True):
        own.copy_(raw[start : start + num_bytes])


def extract_piece(stack: torch.Tensor, index: int, layout: StackLayout) -> torch.Tensor:
    """Return one matrix as `packing.py` packs it, byte for byte: the inverse of `insert_piece`.

    Args:
        stack (`torch.Tensor`): The buffer `[M, 1]` of all, not a shard of it.
        index (`int`): Which piece.
        layout (`StackLayout`): The layout of `stack`.
    """
    raw = torch.zeros(layout.piece.num_bytes, dtype=torch.uint8, device=stack.device)
    for own, (start, num_bytes) in zip(_parts(stack, index, index + 1, layout), _parts_of_one(layout), strict=True):
        raw[start : start + num_bytes] = own
    return raw.view(stack.dtype).view(-1, 1)


def dequantize_pieces(
    stack: torch.Tensor, start: int, stop: int, layout: StackLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return the pieces from `start` up to `stop` as one tensor `[stop - start, N, K]`.

    The values are those that bitsandbytes gives each of them, bit for bit.

    Args:
        stack (`torch.Tensor`): The buffer `[M, 1]` of all, not a shard of it.
        start (`int`), stop (`int`): Which pieces.
        layout (`StackLayout`): The layout of `stack`.
        dtype (`torch.dtype`): Dtype of the result.
    """
    kind = layout.piece.quant_type, layout.piece.double_quant, layout.piece.blocksize
    if stack.is_cuda and (fused := _find_fused(stack.device, dtype, *kind)):
        return fused(stack, start, stop, layout, dtype)
    return dequantize_pieces_in_parts(stack, start, stop, layout, dtype)


def dequantize_pieces_fused(
    stack: torch.Tensor, start: int, stop: int, layout: StackLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return what `dequantize_pieces` does, by one kernel. Needs triton."""
    from ..kernels.nested_dequantize import dequantize_run

    starts = [
        first + start * num_bytes for first, num_bytes in zip(layout.part_starts, layout.part_bytes, strict=False)
    ]
    return dequantize_run(stack.detach(), layout.piece, stop - start, starts, dtype, nested_blocksize=NESTED_BLOCKSIZE)


def dequantize_pieces_in_parts(
    stack: torch.Tensor, start: int, stop: int, layout: StackLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return what `dequantize_pieces` does, by torch's and bitsandbytes' kernels: first the scales, then the codes."""
    piece, count = layout.piece, stop - start
    codes, absmax, nested, offset = _parts(stack, start, stop, layout)
    if piece.double_quant:
        scales_PB = dynamic_map(stack.device)[absmax.int()].view(count, piece.num_blocks)
        nested_PB = nested.view(torch.float32).view(count, piece.num_nested_blocks)
        num_full = piece.num_blocks // NESTED_BLOCKSIZE
        full, rest = scales_PB.tensor_split([num_full * NESTED_BLOCKSIZE], dim=1)
        full.unflatten(1, (num_full, NESTED_BLOCKSIZE)).mul_(nested_PB[:, :num_full, None])
        rest.mul_(nested_PB[:, num_full:])  # the last block of scales may be short
        scales = scales_PB.add_(offset.view(torch.float32).view(count, 1)).view(-1)
    else:
        scales = absmax.view(torch.float32)
    # In rows of one block: on CPUs, bitsandbytes 0.50 takes wrong scales where a row does not consist of whole blocks.
    blocks = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), scales, piece.blocksize, piece.quant_type, (scales.numel(), piece.blocksize), dtype
    )
    return blocks.view(count, *piece.shape)


@tried("Experts are dequantised by several kernels a chunk instead of a fused one.")
def _find_fused(device: torch.device, dtype: torch.dtype, *kind: Any) -> Callable[..., torch.Tensor]:
    """Return `dequantize_pieces_fused` if it gives the bits of bitsandbytes, for a dtype and kind of layout."""
    layout = StackLayout(PackedLayout((320, 64), *kind), 3)  # more than one nested block, the last of them short
    stack = torch.zeros(layout.packed_shape(torch.float32), dtype=torch.float32, device=device)
    for index in range(layout.num_pieces):
        piece = torch.linspace(-1, index, layout.piece.numel, device=device).view(layout.piece.shape)
        insert_piece(stack, index, quantize(piece, layout.piece, torch.float32), layout)
    probe = (stack, 1, 3, layout, dtype)
    if not torch.equal(dequantize_pieces_fused(*probe), dequantize_pieces_in_parts(*probe)):
        raise OtherNumbers("Its numbers are not those of bitsandbytes on this device.")
    return dequantize_pieces_fused


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _parts(stack: torch.Tensor, start: int, stop: int, layout: StackLayout) -> list[torch.Tensor]:
    """Return views of the codes, absmax, nested absmax and offsets of neighbouring pieces."""
    raw = _bytes_of(stack)
    return [
        raw[first + start * num_bytes : first + stop * num_bytes]
        for first, num_bytes in zip(layout.part_starts, layout.part_bytes, strict=False)
    ]


def _parts_of_one(layout: StackLayout) -> list[tuple[int, int]]:
    """Return where a piece packed alone has the same four parts: first byte and size."""
    absmax, nested, offset, _ = layout.piece.offsets
    return list(zip((0, absmax, nested, offset), layout.part_bytes, strict=True))

"""Stacked pieces are the pieces that bitsandbytes makes, byte for byte and value for value."""

from __future__ import annotations

import bitsandbytes.functional as bnb_functional
import pytest
import torch

from hf_qlora_fsdp.experts.stacks import StackLayout, dequantize_pieces, extract_piece, insert_piece
from hf_qlora_fsdp.packing import PackedLayout, quantize


# 128 blocks, less than share a second-level scale; 640, two and a half times as many; rows of one block and a half.
@pytest.mark.parametrize("shape", [(128, 64), (320, 128), (256, 96)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_stacked_pieces_are_those_of_bitsandbytes(shape: tuple[int, int], double_quant: bool, quant_type: str) -> None:
    piece = PackedLayout(shape, quant_type, double_quant)
    layout = StackLayout(piece, num_pieces=4)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * (index + 1) for index in range(4)]
    for storage_dtype in (torch.bfloat16, torch.float32):
        packed = [quantize(weight, piece, storage_dtype) for weight in weights]
        stack = torch.zeros(layout.packed_shape(storage_dtype), dtype=storage_dtype)
        for index in (2, 0, 3, 1):
            insert_piece(stack, index, packed[index], layout)
        for index in range(4):
            found = extract_piece(stack, index, layout)
            assert torch.equal(found.view(torch.uint8), packed[index].view(torch.uint8))
        for dtype in (torch.bfloat16, torch.float32):
            values = dequantize_pieces(stack, 1, 3, layout, dtype)
            assert torch.equal(values, torch.stack([_reference(weight, piece, dtype) for weight in weights[1:3]]))


def _reference(weight: torch.Tensor, piece: PackedLayout, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes makes of it, in a single row: its CPU kernel errs where rows are not whole blocks."""
    codes, state = bnb_functional.quantize_4bit(
        weight, compress_statistics=piece.double_quant, quant_type=piece.quant_type, blocksize=piece.blocksize
    )
    state.shape, state.dtype = (1, piece.numel), dtype
    return bnb_functional.dequantize_4bit(codes, state).view(piece.shape)


def test_a_stack_is_as_large_as_its_parts() -> None:
    piece = PackedLayout((14336, 4096))
    layout = StackLayout(piece, num_pieces=8)
    # 4 bits a weight, 8 bits a block of 64, 32 bits a block of 64 x 256, and an offset each: 4.127 bits a weight.
    assert layout.num_bytes == 8 * (piece.numel // 2 + piece.numel // 64 + 4 * piece.numel // (64 * 256) + 4)
    assert layout.packed_shape(torch.bfloat16) == (layout.num_bytes // 2, 1)


def test_matrices_of_broken_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 32\].*whole number of blocks.*blocksize that divides 96"):
        StackLayout(PackedLayout((3, 32)), num_pieces=2)

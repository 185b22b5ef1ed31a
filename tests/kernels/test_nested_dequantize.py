"""The fused kernel gives the bits of bitsandbytes: on a GPU, in Triton's interpreter, and by its instructions.

Triton is no requirement, so two of these tests run where it happens to be installed. Its interpreter rounds nothing to
bfloat16 (it cuts the bits off), so there the other two dtypes are compared; that the compiled kernel rounds to nearest,
and rounds each product before a sum, can be read in its instructions, for which no GPU is needed.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from hf_qlora_fsdp import packing
from hf_qlora_fsdp.experts import stacks as expert_stacks
from hf_qlora_fsdp.experts.stacks import (
    StackLayout,
    dequantize_pieces,
    dequantize_pieces_fused,
    dequantize_pieces_in_parts,
    extract_piece,
    insert_piece,
)
from hf_qlora_fsdp.packing import (
    ALL,
    NESTED_BLOCKSIZE,
    PackedLayout,
    dequantize,
    dequantize_in_parts,
    quantize,
    unpack,
)
from tests.interpreted import needs_triton, run_interpreted

# Whole nested blocks and programs; a last nested block that is not full; a last block that is not full; an odd number
# of weights, so that half a byte is left over; one block that is all there is.
SHAPES = [(256, 256), (192, 320), (96, 70), (33, 65), (5, 7), (6, 4)]
KINDS = list(itertools.product(["nf4", "fp4"], [True, False]))
BLOCKSIZES = [64, 128, 4096]
LAYOUTS = [PackedLayout(shape, *kind, size) for shape in SHAPES for kind in KINDS for size in BLOCKSIZES]

# A nested block is 256 blocks of 64 weights: one of each piece, whole; one and a short one; one that is short.
STACKS = [StackLayout(PackedLayout(shape, *kind), 4) for shape in [(256, 64), (320, 64), (96, 192)] for kind in KINDS]


def make_packed(layout: PackedLayout, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Return a packed weight with blocks of zeros and of very different sizes."""
    torch.manual_seed(seed)
    weight = torch.randn(layout.shape) * torch.logspace(-3, 1, layout.shape[0])[:, None]
    weight[layout.shape[0] // 2] = 0
    return quantize(weight.to(device), layout, torch.bfloat16)


def dequantize_by_definition(packed: torch.Tensor, layout: PackedLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return what the weight is: the value of each code times the scale of its block, rounded once."""
    codes, absmax = unpack(packed, layout)
    values = get_4bit_type(layout.quant_type, device="cpu")[torch.stack([codes >> 4, codes & 15], 1).flatten().int()]
    scales = absmax.repeat_interleave(layout.blocksize)
    return (values[: layout.numel] * scales[: layout.numel]).to(dtype).view(layout.shape)


def compare_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    bits = torch.int32 if mine.dtype == torch.float32 else torch.int16
    return mine.dtype == theirs.dtype and torch.equal(mine.view(bits), theirs.view(bits))


def cut_in_thirds(layout: PackedLayout, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Return rows and columns of pieces of a third or less, where rows are whole blocks: first across, then along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE_BYTES", layout.numel * dtype.itemsize // 3)
        across, along = layout.row_pieces(dtype), layout.column_pieces(dtype)
    return [*((rows, ALL) for rows in across), *((ALL, columns) for columns in along)]


def make_stack(layout: StackLayout, device: str = "cpu") -> torch.Tensor:
    stack = torch.zeros(layout.packed_shape(torch.bfloat16), dtype=torch.bfloat16, device=device)
    for index in range(layout.num_pieces):
        insert_piece(stack, index, make_packed(layout.piece, device, seed=index), layout)
    return stack


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_are_those_of_bitsandbytes_on_a_gpu(dtype):
    pytest.importorskip("triton")
    fused = packing._find_fused(torch.device("cuda", 0), dtype)
    assert fused is not None and packing._find_fused(torch.device("cuda", 0), dtype, by_rows=True) is not None
    for layout in [*LAYOUTS, PackedLayout((4096, 4097)), PackedLayout((4096, 8192))]:
        packed = make_packed(layout, "cuda:0")
        expected = dequantize_in_parts(packed, layout, dtype)
        assert compare_bits(fused(packed, layout, dtype), expected), layout
        assert compare_bits(dequantize(packed, layout, dtype), expected), layout
        for piece in cut_in_thirds(layout, dtype):
            assert compare_bits(fused(packed, layout, dtype, *piece), expected[piece]), (layout, piece)
            assert compare_bits(dequantize_in_parts(packed, layout, dtype, *piece), expected[piece]), (layout, piece)
            wide = torch.zeros(expected[piece].shape[0], expected[piece].shape[1] + 16, dtype=dtype, device="cuda:0")
            part = dequantize(packed, layout, dtype, *piece, out=wide[:, :-16])
            assert compare_bits(part, expected[piece]) and not wide[:, -16:].any(), (layout, piece)
    assert expert_stacks._find_fused(torch.device("cuda", 0), dtype) is not None
    for stacked in STACKS:
        stack = make_stack(stacked, "cuda:0")
        for run in ((0, 4), (1, 3), (3, 4)):
            expected = dequantize_pieces_in_parts(stack, *run, stacked, dtype)
            assert compare_bits(dequantize_pieces(stack, *run, stacked, dtype), expected), (stacked, run)


def interpret() -> None:
    """Run the kernel in Triton's interpreter, in a process that was started with TRITON_INTERPRET=1.

    The CPU kernel of bitsandbytes 0.50 takes wrong scales for some layouts, as rows of 192 weights in blocks of 128, so
    it is compared only at the usual size of blocks.
    """
    from hf_qlora_fsdp.kernels.nested_dequantize import dequantize_packed

    torch.compiler.set_stance("force_eager")  # bitsandbytes compiles its CPU code for each layout
    for layout, dtype in itertools.product(LAYOUTS, [torch.float16, torch.float32]):
        packed = make_packed(layout)
        mine = dequantize_packed(packed, layout, dtype, nested_blocksize=NESTED_BLOCKSIZE)
        assert torch.equal(mine, dequantize_by_definition(packed, layout, dtype)), (layout, dtype)
        if layout.blocksize == 64:
            assert torch.equal(mine, dequantize_in_parts(packed, layout, dtype)), (layout, dtype)
        for piece in cut_in_thirds(layout, dtype):
            part = dequantize_packed(packed, layout, dtype, *piece, nested_blocksize=NESTED_BLOCKSIZE)
            assert torch.equal(part, mine[piece]), (layout, dtype, piece)
            if not layout.has_whole_rows:
                continue
            wide = torch.zeros(part.shape[0], part.shape[1] + 3, dtype=dtype)
            dequantize_packed(packed, layout, dtype, *piece, wide[:, :-3], nested_blocksize=NESTED_BLOCKSIZE)
            assert torch.equal(wide, torch.nn.functional.pad(part, (0, 3))), (layout, dtype, piece)
    for layout in STACKS:
        stack = make_stack(layout)
        mine = dequantize_pieces_fused(stack, 1, 3, layout, torch.float32)
        pieces = [extract_piece(stack, index, layout) for index in range(1, 3)]
        expected = [dequantize_by_definition(piece, layout.piece, torch.float32) for piece in pieces]
        assert torch.equal(mine, torch.stack(expected)), layout
        assert torch.equal(mine, dequantize_pieces(stack, 1, 3, layout, torch.float32)), layout
    print(f"compared {len(LAYOUTS)} layouts")


@needs_triton
def test_numbers_are_those_of_bitsandbytes_in_the_interpreter():
    assert f"compared {len(LAYOUTS)} layouts" in run_interpreted(__name__)


@needs_triton
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("compute_capability", [80, 90])
def test_products_are_rounded_before_they_are_added(compute_capability, by_rows):
    """The option that the launch passes is what keeps the compiler from a multiply-add, which rounds once."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_qlora_fsdp.kernels.nested_dequantize import NUM_WARPS, _dequantize

    constants = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE, "NUM_BLOCKS": 32}
    constants |= {"BY_ROWS": by_rows, "DOUBLE_QUANT": True}
    pointers = {"packed_ptr": "*u8", "out_ptr": "*bf16", "map4_ptr": "*fp32", "map8_ptr": "*fp32"}
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in _dequantize.arg_names
    }
    source = triton.compiler.ASTSource(_dequantize, signature, constexprs=constants)
    target = GPUTarget("cuda", compute_capability, 32)

    def compile_with(fusion: bool) -> str:
        options = {"num_warps": NUM_WARPS, "enable_fp_fusion": fusion}
        return triton.compile(source, target=target, options=options).asm["ptx"]

    assert "fma." in compile_with(True)
    instructions = compile_with(False)
    assert "fma." not in instructions and "mul.rn.f32" in instructions and "add.rn.f32" in instructions
    assert set(re.findall(r"cvt\.\w+\.bf16\w*\.f32", instructions)) <= {"cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"}


def test_without_triton_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_qlora_fsdp.kernels.nested_dequantize", raising=False)
    packing._find_fused.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert packing._find_fused(torch.device("cpu"), torch.bfloat16) is None
        assert packing._find_fused(torch.device("cpu"), torch.bfloat16) is None
    packing._find_fused.cache_clear()
    assert len(caplog.messages) == 1 and "triton" in caplog.messages[0]


@needs_triton
def test_a_kernel_with_other_numbers_is_not_used(monkeypatch, caplog):
    from hf_qlora_fsdp.kernels import nested_dequantize

    def wrong(packed, layout, dtype, rows, columns, out, nested_blocksize):
        return torch.zeros(layout.part(rows, columns).shape, dtype=dtype)

    monkeypatch.setattr(nested_dequantize, "dequantize_packed", wrong)
    packing._find_fused.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert packing._find_fused(torch.device("cpu"), torch.bfloat16) is None
        assert packing._find_fused(torch.device("cpu"), torch.bfloat16, by_rows=True) is None
    packing._find_fused.cache_clear()
    assert "not those of bitsandbytes" in caplog.text and "Error" not in caplog.text

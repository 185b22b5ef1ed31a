"""A packed layer computes what bitsandbytes' own layer computes, bit for bit, and never hands its weight to autograd.

The reference is `bitsandbytes.nn.Linear4bit`, in training mode: its evaluation mode uses another kernel on some CPUs.
"""

from __future__ import annotations

import copy
import itertools

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora_fsdp import packing
from hf_qlora_fsdp.packed_linear import PackedLinear4bit, repack
from hf_qlora_fsdp.packing import ALL, PackedLayout, dequantize, pack, quantize, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Whole nested blocks; a last nested block that is not full; a last block that is not full; one that is all there is.
SHAPES = [(256, 128), (192, 320), (96, 70), (6, 4)]

KINDS = list(itertools.product(["nf4", "fp4"], [True, False]))


def make_linear(
    shape: tuple[int, int],
    quant_type: str = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
    bias: bool = True,
    seed: int = 0,
) -> bnb.nn.Linear4bit:
    """Return a quantised layer of bitsandbytes, and the 16-bit weight it was made of as `.original`."""
    torch.manual_seed(seed)
    rows, columns = shape
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    nn.init.normal_(plain.weight, std=0.05)
    options = {"compress_statistics": double_quant, "quant_type": quant_type, "quant_storage": storage}
    linear = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=dtype, **options)
    linear.weight = bnb.nn.Params4bit(plain.weight.detach(), requires_grad=False, module=linear, **options)
    linear.to("cpu")  # quantises
    assert linear.weight.quant_state is not None
    linear.original = plain.weight.detach()
    if bias:
        linear.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    return linear.train()


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_bitsandbytes(shape, quant_type, double_quant, dtype):
    linear = make_linear(shape, quant_type, double_quant, dtype)
    layout = PackedLayout(shape, quant_type, double_quant)
    packed = quantize(linear.original, layout, dtype)

    codes, absmax = unpack(packed, layout)
    state = linear.weight.quant_state
    assert torch.equal(codes, raw_bytes(linear.weight))
    scales = state.absmax
    if double_quant:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(absmax, scales)
    expected = bnb.functional.dequantize_4bit(linear.weight.data, state)
    assert torch.equal(dequantize(packed, layout, dtype), expected)

    ours = PackedLinear4bit(layout, bias=True, compute_dtype=dtype, storage_dtype=dtype)
    ours.set_packed(packed)
    ours.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    x = torch.randn(3, 5, shape[1], dtype=dtype)
    grad_output = torch.randn(3, 5, shape[0], dtype=dtype)
    results = []
    for layer in (ours, linear):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad_output)
        results.append((y.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_bias_is_trained_as_in_a_plain_linear_layer():
    linear = make_linear((96, 64), dtype=torch.float32)
    ours = repack(linear, compute_dtype=torch.float32, storage_dtype=torch.float32)
    ours.bias.requires_grad_(True)
    plain = nn.Linear(64, 96)
    plain.weight.data = ours.dequantize()
    plain.bias.data = linear.bias.detach().clone()
    x = torch.randn(3, 5, 64)
    for layer in (ours, plain):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad, rtol=1e-6, atol=1e-5)  # a sum of 15 in another order


def test_input_in_another_dtype_is_computed_in_the_compute_dtype_and_comes_back_in_its_own():
    linear = make_linear((96, 64))
    ours = repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    x = torch.randn(2, 64)
    assert ours(x).dtype == torch.float32
    assert torch.equal(ours(x), ours(x.bfloat16()).float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_layout_has_room_for_exactly_what_bitsandbytes_makes(shape, double_quant):
    linear = make_linear(shape, double_quant=double_quant)
    state = linear.weight.quant_state
    layout = PackedLayout(shape, double_quant=double_quant)
    assert layout.codes_bytes == linear.weight.nbytes
    assert layout.absmax_bytes == state.absmax.nbytes
    assert layout.num_nested_blocks == (state.state2.absmax.numel() if double_quant else 0)

    absmax, nested, offset, end = layout.offsets
    assert layout.codes_bytes <= absmax and absmax + layout.absmax_bytes <= nested
    assert nested + 4 * layout.num_nested_blocks <= offset <= end
    assert all(start % 16 == 0 for start in layout.offsets)
    # No more than the rounding of four parts and the offset, so a weight really takes 4.127 (or 4.5) bits.
    content = layout.codes_bytes + layout.absmax_bytes + 4 * layout.num_nested_blocks
    assert content <= layout.num_bytes < content + 5 * 16
    for dtype in (torch.uint8, *DTYPES):
        rows, columns = layout.packed_shape(dtype)
        assert rows * dtype.itemsize == layout.num_bytes and columns == 1


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_repack_copies_byte_for_byte(storage, quant_type, double_quant):
    shape = (192, 320)
    linear = make_linear(shape, quant_type, double_quant, storage=storage)
    before = raw_bytes(linear.weight).clone()
    ours = repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16 and not ours.weight.requires_grad
    assert (ours.weight.quant_type, ours.weight.compress_statistics) == (quant_type, double_quant)
    assert torch.equal(unpack(ours.weight, ours.layout)[0], before)
    layout = PackedLayout(shape, quant_type, double_quant)
    assert ours.layout == layout
    assert torch.equal(raw_bytes(ours.weight), raw_bytes(quantize(linear.original, layout, torch.bfloat16)))
    assert torch.equal(ours.bias, linear.bias)


@pytest.mark.parametrize("double_quant", [True, False])
def test_repack_after_an_evaluation_that_reordered_the_codes(double_quant):
    linear, fresh = (make_linear((128, 256), double_quant=double_quant) for _ in range(2))
    with torch.no_grad():
        linear.eval()(torch.randn(1, 256, dtype=torch.bfloat16))
    options = {"compute_dtype": torch.bfloat16, "storage_dtype": torch.bfloat16}
    after, expected = repack(linear, **options), repack(fresh, **options)
    assert after.layout == expected.layout
    codes, scales = unpack(after.weight, after.layout)
    expected_codes, expected_scales = unpack(expected.weight, expected.layout)
    assert torch.equal(codes, expected_codes)
    # Where the CPU has that kernel, the scales have been through bfloat16, half a unit in the 8th bit, and then through
    # the 8-bit map a second time, whose steps are at most 1/64 of the largest deviation from their mean.
    deviation = (expected_scales - expected_scales.mean()).abs().max() if double_quant else torch.tensor(0.0)
    bound = expected_scales.abs().max() * 2**-9 + deviation / 64
    if not getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        bound = torch.tensor(0.0)
    assert (scales - expected_scales).abs().max() <= bound


def test_repack_keeps_what_kind_of_layer_the_weight_comes_from():
    from transformers.pytorch_utils import Conv1D

    linear = make_linear((96, 64))
    linear.source_cls = Conv1D
    ours = repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    assert ours.source_cls is Conv1D and ours.training
    assert repack(linear.eval(), compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16).training is False


def test_repack_on_the_meta_device():
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(64, 96, bias=False, compress_statistics=False, quant_type="fp4")
    ours = repack(linear, compute_dtype=torch.float16, storage_dtype=torch.float16)
    assert ours.layout == PackedLayout((96, 64), "fp4", False)
    assert ours.weight.is_meta and ours.weight.dtype == torch.float16 and ours.bias is None


def test_codes_of_another_size_are_refused():
    linear = make_linear((96, 64))
    with pytest.raises(ValueError, match=r"shape \[96, 128\].*needs 6,144 bytes where 3,072 were given.*one revision"):
        pack(linear.weight.data, linear.weight.quant_state, PackedLayout((96, 128)), torch.bfloat16)


def test_another_8_bit_map_is_refused():
    linear = make_linear((96, 64))
    state = linear.weight.quant_state
    state.state2.code = state.state2.code.flip(0)
    with pytest.raises(ValueError, match=r"8-bit map of their own.*Load the 16-bit checkpoint instead"):
        pack(linear.weight.data, state, PackedLayout((96, 64)), torch.bfloat16)


@pytest.mark.parametrize("trained_bias", [False, True])
def test_autograd_remembers_neither_the_packed_weight_nor_its_16_bit_form(trained_bias):
    linear = make_linear((192, 320))
    ours = repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    ours.bias.requires_grad_(trained_bias)

    def count_saved(layer: nn.Module) -> list[tuple[int, ...]]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            layer(torch.randn(2, 320, dtype=torch.bfloat16, requires_grad=True))
        return saved

    assert count_saved(ours) == []
    assert count_saved(nn.Linear(320, 192, dtype=torch.bfloat16)) != []  # the hook does see what is saved


def test_backward_uses_the_weight_that_is_there_then():
    """FSDP frees the weight after the forward and gathers it anew, perhaps at another address, for the backward."""
    ours = repack(make_linear((96, 64)), compute_dtype=torch.float32, storage_dtype=torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    y = ours(x)
    other = copy.deepcopy(ours)
    gathered = ours.weight.detach().clone()
    ours.weight.data.zero_()
    ours.set_packed(gathered)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 96) @ other.dequantize())


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("shape", [(64, 96), (192, 320), (33, 64), (128, 576), (10, 200), (33, 70), (3, 129)])
def test_each_weight_has_the_scale_of_its_block(shape, blocksize):
    """Against the definition, since bitsandbytes itself is wrong here on some CPUs: rows that are no whole blocks."""
    layout = PackedLayout(shape, blocksize=blocksize)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, layout.numel).view(shape)  # neighbouring blocks have scales far apart
    packed = quantize(torch.randn(shape, generator=generator) * sizes, layout, torch.float32)
    codes, absmax = unpack(packed, layout)
    values = bnb.functional.get_4bit_type("nf4", device="cpu")
    indices = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: layout.numel].long()
    expected = (values[indices] * absmax.repeat_interleave(blocksize)[: layout.numel]).view(shape)
    assert torch.equal(dequantize(packed, layout, torch.float32), expected)


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("shape", [(256, 256), (192, 384), (1000, 640), (33, 8192), (7, 128)])
def test_pieces_have_the_bits_that_they_have_in_the_whole(shape, blocksize, quant_type, double_quant, monkeypatch):
    """Where rows are whole nested blocks, halves and more, or have no part of one in common; the last piece shorter."""
    layout = PackedLayout(shape, quant_type, double_quant, blocksize)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, layout.numel).view(shape)
    packed = quantize(torch.randn(shape, generator=generator) * sizes, layout, torch.bfloat16)
    for dtype in DTYPES:
        whole = dequantize(packed, layout, dtype)
        monkeypatch.setattr(packing, "PIECE_BYTES", layout.numel * dtype.itemsize // 3)
        rows, columns = layout.row_pieces(dtype), layout.column_pieces(dtype)
        assert len(rows) >= 3 and (len(columns) >= 3 or shape[1] < 3 * blocksize)
        by_rows = torch.cat([dequantize(packed, layout, dtype, piece) for piece in rows])
        by_columns = torch.cat([dequantize(packed, layout, dtype, columns=piece) for piece in columns], dim=1)
        assert torch.equal(raw_bytes(by_rows), raw_bytes(whole))
        assert torch.equal(raw_bytes(by_columns), raw_bytes(whole))


@pytest.mark.parametrize("dim", [0, 1])
def test_of_a_piece_nothing_more_is_unpacked(dim, monkeypatch):
    layout = PackedLayout((1024, 1024))
    packed = quantize(torch.randn(layout.shape), layout, torch.bfloat16)
    monkeypatch.setattr(packing, "PIECE_BYTES", layout.numel * 2 // 16)
    piece = [layout.row_pieces, layout.column_pieces][dim](torch.bfloat16)[1]
    largest: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if result.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr():
                largest.append(result.untyped_storage().nbytes())
            return result

    with Sizes():
        part = dequantize(packed, layout, torch.bfloat16, *((piece, ALL) if dim == 0 else (ALL, piece)))
    assert part.nbytes == packing.PIECE_BYTES == max(largest)
    assert sorted(set(largest))[-2] <= part.nbytes // 4  # a copy of its codes, and less for scales


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "columns"),
    [
        ((14336, 4096), torch.bfloat16, [], []),
        ((28672, 8192), torch.bfloat16, [14336] * 2, [4096] * 2),
        ((8192, 28672), torch.bfloat16, [4096] * 2, [14336] * 2),
        ((53248, 16384), torch.bfloat16, [8192] * 6 + [4096], [2048] * 8),
        ((27648, 5120), torch.bfloat16, [14336, 13312], [4096, 1024]),
        ((28672, 8192), torch.float32, [8192] * 3 + [4096], [2048] * 4),
        ((96, 2**21), torch.bfloat16, [64, 32], [1048576] * 2),  # where not even PIECE_STEP fits
        ((2**21, 150), torch.bfloat16, [], []),  # rows that are no whole blocks
    ],
)
def test_large_weights_are_cut_evenly(shape, dtype, rows, columns):
    layout = PackedLayout(shape)
    for size, pieces, expected in zip(
        shape, (layout.row_pieces(dtype), layout.column_pieces(dtype)), (rows, columns), strict=True
    ):
        assert [piece.stop - piece.start for piece in pieces if piece != ALL] == expected
        if expected:
            assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
            assert pieces[-1].stop == size
        else:
            assert pieces == [ALL]

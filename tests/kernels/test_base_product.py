"""Weights made a piece at a time: results are as exact as of whole ones, and no two pieces are there together.

Exactness is held against float64, beside what PEFT's layers compute with whole weights, by the bound that holds for
whole weights (test_lora_linear.py).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_qlora_fsdp import packing
from hf_qlora_fsdp.kernels.base_product import multiply_base
from hf_qlora_fsdp.kernels.lora_group import apply_lora_group
from hf_qlora_fsdp.kernels.lora_linear import apply_lora_linear
from hf_qlora_fsdp.packed_linear import PackedLinear4bit
from hf_qlora_fsdp.packing import ALL
from hf_qlora_fsdp.speed.fusion import fuse_lora, unfuse_lora
from tests.kernels.test_lora_linear import COLUMNS, DTYPES, error_of, make_layer, weights_of
from tests.kernels.test_swiglu import HIDDEN, adapter_of, compute_in_float64, make_mlp

ROWS = 1792
NUM_TOKENS = 4
KINDS = ["layer without adapter", "layer", "group", "mlp"]


@dataclass
class Case:
    """Layers, and three ways to compute what they put out for x and parameters."""

    modules: list[nn.Module]
    columns: int
    parameters: list[torch.Tensor]
    ours: Callable[[torch.Tensor], Any]
    peft: Callable[[torch.Tensor], Any]
    exact: Callable[..., Any]

    @property
    def bases(self) -> list[PackedLinear4bit]:
        return [part for module in self.modules for part in module.modules() if isinstance(part, PackedLinear4bit)]


def make_case(kind: str, dtype: torch.dtype, bias: bool, device: str = "cpu") -> Case:
    if kind == "mlp":
        mlp = make_mlp(dtype, bias, inner=ROWS).to(device)

        def run(prepare: Callable[[nn.Module], object], x: torch.Tensor) -> torch.Tensor:
            prepare(mlp)
            return mlp(x)

        return Case(
            [mlp],
            HIDDEN,
            adapter_of(mlp),
            lambda x: run(fuse_lora, x),
            lambda x: run(unfuse_lora, x),
            lambda x, *adapter: compute_in_float64(mlp, x, adapter),
        )
    sizes = {"group": (ROWS, 512, 768)}.get(kind, (ROWS,))
    layers = [make_layer(dtype, bias, seed, rows=rows).to(device) for seed, rows in enumerate(sizes)]
    bases = [layer.base_layer for layer in layers]
    scalings = tuple(layer.scaling["default"] for layer in layers)
    parameters = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def compute_exactly(x: torch.Tensor, *adapter: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for base, scaling, pair in itertools.zip_longest(
            bases, scalings, zip(adapter[::2], adapter[1::2], strict=True)
        ):
            y = nn.functional.linear(x, base.dequantize().double(), base.bias.double() if bias else None)
            outputs.append(y + scaling * (x @ pair[0].T) @ pair[1].T if pair else y)
        return outputs

    if kind == "layer without adapter":
        return Case(bases, COLUMNS, [], bases[0], bases[0], compute_exactly)
    weights = tuple(map(weights_of, layers))
    ours = {
        "layer": lambda x: apply_lora_linear(x, weights[0], scalings[0]),
        "group": lambda x: apply_lora_group(x, weights, scalings),
    }
    return Case(layers, COLUMNS, parameters, ours[kind], lambda x: [layer(x) for layer in layers], compute_exactly)


def differentiate(function: Callable[..., Any], x: torch.Tensor, parameters: Any, seed: int = 5) -> list[torch.Tensor]:
    """Return outputs and gradients of x and parameters."""
    outputs = function(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, [x, *parameters], dys)]


@pytest.fixture(params=[2, 7], ids="{} pieces".format)
def num_pieces(request: pytest.FixtureRequest) -> int:
    return request.param


def cut(patch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, num_pieces: int) -> None:
    """Have the largest weight of a case made in so many pieces, and the others in some."""
    patch.setattr(packing, "PIECE_BYTES", {2: 1024, 7: 256}[num_pieces] * case.columns * dtype.itemsize)
    assert len(case.bases[0].row_pieces(dtype)) == num_pieces
    assert len(case.bases[0].column_pieces(dtype)) > 1


def compare(kind: str, dtype: torch.dtype, bias: bool, num_pieces: int, device: str = "cpu") -> None:
    case = make_case(kind, dtype, bias, device)
    x = torch.randn(4, 15, case.columns, generator=torch.Generator().manual_seed(3)).to(device, dtype).requires_grad_()
    doubled = [tensor.detach().double().requires_grad_() for tensor in (x, *case.parameters)]
    exact = differentiate(lambda x: case.exact(x, *doubled[1:]), doubled[0], doubled[1:])
    peft = differentiate(case.peft, x, case.parameters)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, case, dtype, num_pieces)
        ours = differentiate(case.ours, x, case.parameters)
    for mine, theirs in zip(ours, peft, strict=True):
        assert mine.dtype == theirs.dtype == dtype and mine.shape == theirs.shape
    for mine, theirs in zip(error_of(ours, exact), error_of(peft, exact), strict=True):
        assert mine <= 1.5 * theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_are_as_exact(kind: str, dtype: torch.dtype, bias: bool, num_pieces: int) -> None:
    compare(kind, dtype, bias, num_pieces)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch 2.11's first product in autograd's thread
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_as_exact_on_a_gpu(kind: str, num_pieces: int) -> None:
    for bias in (False, True):
        compare(kind, torch.bfloat16, bias, num_pieces, "cuda")


class Unpacked(TorchDispatchMode):
    """Counts the bytes of 16-bit weights that are there: what an operation puts out that is larger than x and no B.

    Args:
        operation (`Any`): The one that makes them.
    """

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation
        self.now = self.most = self.num_weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.operation and result.dim() == 2 and result.shape[0] > NUM_TOKENS and result.shape[1] >= 64:
            storage = result.untyped_storage()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            self.num_weights += 1
            weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, num_bytes: int) -> None:
        self.now -= num_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_piece_is_there_at_a_time(kind: str, bias: bool, num_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    case = make_case(kind, dtype, bias)
    x = torch.randn(NUM_TOKENS, case.columns, dtype=dtype, requires_grad=True)
    cut(monkeypatch, case, dtype, num_pieces)
    with Unpacked(torch.ops.bitsandbytes.dequantize_4bit.default) as unpacked:
        differentiate(lambda x: checkpoint(case.ours, x, use_reentrant=False), x, case.parameters)
    pieces = [
        piece
        for layout in (base.layout for base in case.bases)
        for piece in (
            *(layout.part(rows, ALL) for rows in layout.row_pieces(dtype)),
            *(layout.part(ALL, columns) for columns in layout.column_pieces(dtype)),
        )
    ]
    assert unpacked.most == max(piece.numel * dtype.itemsize for piece in pieces)
    assert unpacked.now == 0 and unpacked.num_weights >= len(pieces)


@pytest.mark.parametrize("bias", [False, True])
def test_joined_weights_are_no_larger_than_a_piece(
    bias: bool, num_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    case = make_case("mlp", dtype, bias)
    x = torch.randn(NUM_TOKENS, case.columns, dtype=dtype, requires_grad=True)
    cut(monkeypatch, case, dtype, num_pieces)
    with torch.no_grad(), Unpacked(torch.ops.aten.new_empty.default) as rows:
        case.ours(x)
    room = HIDDEN + (32 if bias else 16)  # for two adapters of rank 8 and a bias, in steps of 16
    assert rows.num_weights == 2 * num_pieces and rows.now == 0
    assert packing.PIECE_BYTES / 2 <= rows.most <= packing.PIECE_BYTES * room / HIDDEN

    with Unpacked(torch.ops.aten.new_empty.default) as all_weights:
        differentiate(lambda x: checkpoint(case.ours, x, use_reentrant=False), x, case.parameters)
    (block,) = {base.layout.blocksize for base in case.bases}
    assert all_weights.most == (2 * ROWS + 16) * block * dtype.itemsize  # columns are not cut any finer
    assert all_weights.num_weights >= 2 * rows.num_weights + HIDDEN // block and all_weights.now == 0


def test_a_bias_is_rounded_into_the_sum_once(num_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes all but the rounding of the product away: were that rounded first, nothing would be left."""
    dtype = torch.bfloat16
    case = make_case("layer", dtype, False)
    (base,) = case.bases
    x = torch.randn(1, case.columns, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = x.double() @ base.dequantize(dtype).double().T
    bias = -exact[0].to(dtype)
    cut(monkeypatch, case, dtype, num_pieces)
    error = (multiply_base(x, base, bias).double() - (exact + bias.double())).norm()
    assert error <= 0.02 * (exact + bias.double()).norm()

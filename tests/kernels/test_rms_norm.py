"""RMSNorm as one function: transformers' numbers, gradients as exact, and less that is kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_qlora_fsdp.kernels.rms_norm import apply_rms_norm, differentiate_in_parts, normalize_in_parts
from tests.interpreted import needs_triton, run_interpreted
from tests.kernels.test_lora_linear import DTYPES, differentiate, error_of

EPS = 1e-5


def make_norm(dtype: torch.dtype, width: int = 96) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, EPS).to(dtype).requires_grad_(False)
    norm.weight.data = (1 + 0.2 * torch.randn(width)).to(dtype)
    return norm


def compute_in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_no_less_exact_than_transformers(dtype):
    torch.manual_seed(0)
    norm = make_norm(dtype)
    x, dy = (3 * torch.randn(2, 50, 96)).to(dtype), torch.randn(2, 50, 96).to(dtype)
    x64, x = x.double().requires_grad_(), x.requires_grad_()
    exact = differentiate(lambda x: compute_in_float64(x, norm.weight), x64, dy.double())
    theirs = differentiate(norm, x, dy)
    mine = differentiate(lambda x: apply_rms_norm(x, norm), x, dy)
    assert torch.equal(mine[0], theirs[0])
    assert error_of(mine, exact)[1] <= 1.5 * error_of(theirs, exact)[1]


def test_only_the_input_and_one_number_a_row_are_kept():
    norm, x = make_norm(torch.bfloat16), torch.randn(2, 50, 96, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = apply_rms_norm(x, norm)
    assert kept[0] is x and [t.numel() for t in kept[1:]] == [100]
    y.add_(1).sum().backward()  # changed in place by whoever gets it


def test_the_weight_is_the_one_that_is_there_in_the_backward():
    """FSDP gathers it anew; what autograd had kept would be the storage that was freed meanwhile."""
    norm, x = make_norm(torch.float32), torch.randn(4, 96, requires_grad=True)
    expected = torch.autograd.grad(norm(x).sum(), x)[0]
    y, given = apply_rms_norm(x, norm).sum(), norm.weight
    norm.weight = torch.nn.Parameter(given.clone(), requires_grad=False)
    given.data.fill_(torch.nan)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], expected)


def test_gradients_of_gradients_are_refused():
    norm, x = make_norm(torch.float32), torch.randn(4, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply_rms_norm(x, norm).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 96), (96,), (1, 1, 96)])
def test_no_rows_and_a_single_one(shape):
    norm, x = make_norm(torch.float32), torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(apply_rms_norm(x, norm), norm(x))
    assert torch.autograd.grad(apply_rms_norm(x, norm).sum(), x)[0].shape == x.shape


def compare(kernels: Any, dtype: torch.dtype, shape: tuple[int, int], device: str, transposed: bool = False) -> None:
    """Compare the kernels with torch's operations: equal but for the order of sums, which seldom shows in 16 bits."""
    torch.manual_seed(0)
    x, dy = (3 * torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if transposed:  # in memory
        x, dy = (given.t().contiguous().t() for given in (x, dy))
    w = (1 + 0.2 * torch.randn(shape[1], device=device)).to(dtype)
    y, r = normalize_in_parts(x, w, EPS)
    theirs = y, r, differentiate_in_parts(dy, x, w, r)
    mine = *kernels.normalize(x, w, EPS), kernels.differentiate(dy, x, w, r)
    size = r[:, None] * ((w * dy).float().abs() + 10)  # of the terms of a gradient, which may cancel
    for one, other, scale in zip(mine, theirs, (y.float().abs(), r, size), strict=True):
        eps = torch.finfo(one.dtype).eps
        # 16 bits: x r, rounded to the neighbour, is multiplied by w and rounded once more.
        assert ((one.float() - other.float()).abs() <= (16 if eps < 1e-6 else 2) * eps * scale).all(), (dtype, shape)
        assert one.dtype == torch.float32 or (one != other).float().mean() < 1e-2, (dtype, shape)


def interpret() -> None:
    """Run the kernels in Triton's interpreter, in a process that was started with TRITON_INTERPRET=1.

    It cuts off what bfloat16 has no room for instead of rounding, so the other two dtypes are compared. Sizes: several
    rows a program and one, the last program with fewer, a width that is no power of two.
    """
    from hf_qlora_fsdp.kernels import rms_norm
    from hf_qlora_fsdp.kernels import rms_norm_triton as kernels

    for dtype, shape in itertools.product([torch.float32, torch.float16], [(70, 128), (3, 5000), (1, 7)]):
        compare(kernels, dtype, shape, "cpu")
    compare(kernels, torch.float32, (3, 100), "cpu", transposed=True)
    assert rms_norm._find_kernels(torch.device("cpu"), torch.float32) is kernels
    for name in ("normalize", "differentiate"):
        right = getattr(kernels, name)
        setattr(kernels, name, lambda first, *rest, right=right: right(1.01 * first, *rest))
        rms_norm._find_kernels.cache_clear()
        assert rms_norm._find_kernels(torch.device("cpu"), torch.float32) is None, name
        setattr(kernels, name, right)
    assert not kernels.takes(torch.empty(0, 8)) and not kernels.takes(torch.empty(1, 2 * kernels.MOST_COLUMNS))
    print("compared all shapes")


@needs_triton
def test_kernels_give_the_numbers_of_torch_in_the_interpreter():
    assert "compared all shapes" in run_interpreted(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 128), (5, 100), (2048, 4096), (33, 8192)])
def test_kernels_give_the_numbers_of_torch(dtype, shape):
    from hf_qlora_fsdp.kernels.rms_norm import _find_kernels

    kernels = _find_kernels(torch.device("cuda", 0), dtype)
    assert kernels is not None
    for _ in range(2):  # launched anew, and as it was compiled
        compare(kernels, dtype, shape, "cuda:0")

"""The fused layer is no less exact than PEFT's, for its output and every gradient, and keeps no more for the backward.

Both are held against the same numbers in float64: the weights that the layer computes with, taken as exact. Where a
result is rounded to 16 bits, errors have a size that no sum order changes much; half as much again is granted.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from hf_qlora_fsdp.kernels.lora_linear import LoraWeights, apply_lora_linear
from hf_qlora_fsdp.packed_linear import PackedLinear4bit, repack
from tests.test_packing import make_linear

ROWS, COLUMNS, RANK = 192, 320, 8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["2 dims", "3 dims", "3 dims, transposed"]


def make_layer(
    dtype: torch.dtype = torch.bfloat16, bias: bool = False, seed: int = 0, rows: int = ROWS, **options
) -> nn.Module:
    """Return PEFT's layer around a packed one, its adapter in the dtype in which FSDP would gather it."""
    linear = make_linear((rows, COLUMNS), dtype=dtype, bias=bias, seed=seed)
    model = nn.Sequential(repack(linear, compute_dtype=dtype, storage_dtype=dtype))
    model.is_loaded_in_4bit = True  # makes PEFT take its layer for 4 bits
    config = LoraConfig(**({"r": RANK, "lora_alpha": 24, "target_modules": ["0"]} | options))
    layer = inject_adapter_in_model(config, model)[0]
    for part in (layer.lora_A, layer.lora_B):
        nn.init.normal_(part["default"].weight, std=0.1)
        part["default"].weight.data = part["default"].weight.data.to(dtype)
    assert type(layer) is Linear4bit and isinstance(layer.base_layer, PackedLinear4bit)
    return layer


def weights_of(layer: nn.Module) -> LoraWeights:
    return LoraWeights(layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])


def make_inputs(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and dy: `[T, K]`, `[S, T, K]`, or the second in another order of memory."""
    shape = (60,) if kind == "2 dims" else (5, 12)
    x, dy = torch.randn(*shape, COLUMNS, dtype=dtype), torch.randn(*shape, ROWS, dtype=dtype)
    if kind == "3 dims, transposed":
        x, dy = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (x, dy))
        assert not x.is_contiguous()
    return x, dy


def differentiate(function, x, dy, *parameters) -> list[torch.Tensor | None]:
    """Return y and the gradients of x, where it wants one, and of the parameters."""
    y = function(x)
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def error_of(results, exact) -> list[float]:
    return [
        (mine.double() - true).norm().item() / true.norm().item() for mine, true in zip(results, exact, strict=True)
    ]


def compare_with_peft(dtype, kind, bias, use_rslora, x_wants_gradient, device="cpu") -> None:
    layer = make_layer(dtype, bias, use_rslora=use_rslora).to(device)
    scaling = layer.scaling["default"]
    assert scaling == (24 / RANK**0.5 if use_rslora else 3)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, dy = (tensor.to(device) for tensor in make_inputs(kind, dtype))
    x.requires_grad_(x_wants_gradient)

    w64 = layer.base_layer.dequantize().double()
    bias64 = layer.base_layer.bias.double() if bias else None
    x64, a64, b64 = (tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x, a, b))
    exact = differentiate(
        lambda x: nn.functional.linear(x, w64, bias64) + scaling * (x @ a64.T) @ b64.T, x64, dy.double(), a64, b64
    )
    unfused = differentiate(layer, x, dy, a, b)
    fused = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), scaling), x, dy, a, b)
    assert len(fused) == len(unfused) == len(exact) == (4 if x_wants_gradient else 3)
    for mine, theirs in zip(fused, unfused, strict=True):
        assert mine.dtype == theirs.dtype == dtype and mine.shape == theirs.shape
    for mine, theirs in zip(error_of(fused, exact), error_of(unfused, exact), strict=True):
        assert mine <= 1.5 * theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "use_rslora", "x_wants_gradient"), list(itertools.product([False, True], repeat=3)))
def test_it_is_no_less_exact_than_peft(dtype, kind, bias, use_rslora, x_wants_gradient):
    compare_with_peft(dtype, kind, bias, use_rslora, x_wants_gradient)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch 2.11's first product in autograd's thread
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_no_less_exact_than_peft_on_a_gpu(dtype, kind):
    for bias, use_rslora, x_wants_gradient in itertools.product([False, True], repeat=3):
        compare_with_peft(dtype, kind, bias, use_rslora, x_wants_gradient, "cuda")


def test_what_the_result_buffers_held_before_does_not_matter():
    """`addmm_` with beta=0 has to overwrite them: fresh memory may hold NaN, and 0 * NaN is NaN."""
    layer = make_layer()
    x, dy = make_inputs("2 dims", torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
        results = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), 3.0), x, dy, a, b)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "both"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    layer = make_layer(torch.float32)
    x, dy = make_inputs("3 dims", torch.float32)
    x.requires_grad_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), 3.0), x, dy, a, b)
    for name, parameter in (("lora_A", a), ("lora_B", b)):
        parameter.requires_grad_(frozen not in (name, "both"))
    apply_lora_linear(x, weights_of(layer), 3.0).backward(dy)
    assert torch.equal(x.grad, expected[1])
    for parameter, gradient in ((a, expected[2]), (b, expected[3])):
        assert torch.equal(parameter.grad, gradient) if parameter.requires_grad else parameter.grad is None


def test_only_the_input_and_a_thin_matrix_are_kept():
    layer = make_layer(bias=True)
    x, _ = make_inputs("3 dims", torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_lora_linear(x.requires_grad_(), weights_of(layer), 3.0)
    assert [tuple(tensor.shape) for tensor in saved] == [tuple(x.shape), (60, RANK)]
    assert saved[0].data_ptr() == x.data_ptr()


def test_the_backward_uses_the_weights_that_are_there_then():
    """FSDP frees all of them after the forward, and gathers them anew for the backward, perhaps at another address."""
    layer = make_layer(torch.float32)
    x, dy = make_inputs("2 dims", torch.float32)
    x.requires_grad_()
    parameters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    expected = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), 3.0), x, dy, *parameters)
    y = apply_lora_linear(x, weights_of(layer), 3.0)
    gathered = [tensor.detach().clone() for tensor in (layer.base_layer.weight, *parameters)]
    for tensor in (layer.base_layer.weight, *parameters):
        tensor.data.zero_()
    layer.base_layer.set_packed(gathered[0])
    for parameter, value in zip(parameters, gathered[1:], strict=True):
        parameter.data = value
    y.backward(dy)
    for mine, gradient in zip((x.grad, *(p.grad for p in parameters)), expected[1:], strict=True):
        assert torch.equal(mine, gradient)


@pytest.mark.parametrize("kind", ["2 dims", "3 dims"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_comes_out_can_be_changed_in_place(kind, bias):
    """As what comes out of `nn.Linear`: a residual may be added to it, and the gradient is that of the sum."""
    layer = make_layer(torch.float32, bias)
    x, dy = make_inputs(kind, torch.float32)
    parameters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    plain = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), 3.0), x, dy, *parameters)
    doubled = differentiate(lambda x: apply_lora_linear(x, weights_of(layer), 3.0).mul_(2), x, dy, *parameters)
    for mine, half in zip(doubled, plain, strict=True):
        assert torch.equal(mine, 2 * half)

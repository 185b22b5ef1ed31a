"""A group of layers is no less exact than PEFT's layers one by one, for its outputs and every gradient.

Held against float64, as one layer is (test_lora_linear.py); the layers differ in size, rank and scaling, so that each
output and gradient has a shape of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hf_qlora_fsdp.kernels.lora_group import apply_lora_group
from tests.kernels.test_lora_linear import COLUMNS, error_of, weights_of
from tests.kernels.test_lora_linear import make_layer as make_one

ROWS, RANKS = (192, 64, 128), (8, 4, 16)


def make_layers(dtype: torch.dtype, bias: bool) -> list[nn.Module]:
    return [
        make_one(dtype, bias, seed, r=rank, rows=rows)
        for seed, (rows, rank) in enumerate(zip(ROWS, RANKS, strict=True))
    ]


def compare_with_peft(dtype: torch.dtype, bias: bool, x_wants_gradient: bool, device: str = "cpu") -> None:
    layers = [layer.to(device) for layer in make_layers(dtype, bias)]
    scalings = tuple(layer.scaling["default"] for layer in layers)
    assert len(set(scalings)) == 3
    parameters = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 12, COLUMNS, generator=generator).to(device, dtype).requires_grad_(x_wants_gradient)
    dys = [torch.randn(5, 12, rows, generator=generator).to(device, dtype) for rows in ROWS]

    def differentiate(outputs, x, parameters, dys):
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, dys)]

    x64 = x.detach().double().requires_grad_(x_wants_gradient)
    parameters64 = [parameter.detach().double().requires_grad_() for parameter in parameters]
    outputs64 = []
    for layer, scaling, a, b in zip(layers, scalings, parameters64[::2], parameters64[1::2], strict=True):
        bias64 = layer.base_layer.bias.double() if bias else None
        w64 = layer.base_layer.dequantize().double()
        outputs64.append(nn.functional.linear(x64, w64, bias64) + scaling * (x64 @ a.T) @ b.T)
    exact = differentiate(outputs64, x64, parameters64, [dy.double() for dy in dys])
    unfused = differentiate([layer(x) for layer in layers], x, parameters, dys)
    fused = differentiate(apply_lora_group(x, tuple(map(weights_of, layers)), scalings), x, parameters, dys)
    assert len(fused) == len(exact) == (10 if x_wants_gradient else 9)
    for mine, theirs in zip(fused, unfused, strict=True):
        assert mine.dtype == theirs.dtype == dtype and mine.shape == theirs.shape
    for mine, theirs in zip(error_of(fused, exact), error_of(unfused, exact), strict=True):
        assert mine <= 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("bias", "x_wants_gradient"), list(itertools.product([False, True], repeat=2)))
def test_it_is_no_less_exact_than_peft(dtype: torch.dtype, bias: bool, x_wants_gradient: bool) -> None:
    compare_with_peft(dtype, bias, x_wants_gradient)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch 2.11's first product in autograd's thread
def test_it_is_no_less_exact_than_peft_on_a_gpu() -> None:
    for bias, x_wants_gradient in itertools.product([False, True], repeat=2):
        compare_with_peft(torch.bfloat16, bias, x_wants_gradient, "cuda")


@pytest.mark.parametrize("frozen", range(6))
def test_only_what_is_trained_gets_a_gradient_and_the_others_keep_theirs(frozen: int) -> None:
    layers = make_layers(torch.float32, False)
    parameters = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    x = torch.randn(60, COLUMNS, generator=torch.Generator().manual_seed(3))
    gradients = []
    for step in range(2):
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(step == 0 or index != frozen).grad = None
        sum(y.square().sum() for y in apply_lora_group(x, tuple(map(weights_of, layers)), (1.0, 2.0, 3.0))).backward()
        gradients.append([parameter.grad for parameter in parameters])
    for index, (before, after) in enumerate(zip(*gradients, strict=True)):
        assert after is None if index == frozen else torch.equal(before, after)


def test_outputs_can_be_changed_in_place_and_left_unused() -> None:
    layers = make_layers(torch.float32, False)
    x = torch.randn(4, COLUMNS, requires_grad=True, generator=torch.Generator().manual_seed(3))
    first, _, last = apply_lora_group(x, tuple(map(weights_of, layers)), (1.0, 2.0, 3.0))
    first.add_(1)
    (first.sum() + last.sum()).backward()
    assert not layers[1].lora_B["default"].weight.grad.any() and layers[2].lora_B["default"].weight.grad.any()

"""The gated MLP as one function: no less exact than PEFT's layers, and less that is kept."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_qlora_fsdp.kernels import swiglu
from hf_qlora_fsdp.kernels.lora_group import apply_lora_group
from hf_qlora_fsdp.kernels.silu_product import SiluOfHalves, silu_product, write_gradients
from hf_qlora_fsdp.packed_linear import repack
from hf_qlora_fsdp.speed.fusion import FusedMLP, fuse_lora, unfuse_lora
from tests.interpreted import needs_triton, run_interpreted
from tests.kernels.test_lora_linear import DTYPES, differentiate, error_of
from tests.test_packing import make_linear

HIDDEN, INNER, RANK = 128, 320, 8
OF_EACH_ITS_OWN = {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"gate_proj": 7, "up_proj": 3}}


def make_mlp(dtype: torch.dtype, bias: bool = False, inner: int = INNER, **options: Any) -> nn.Module:
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=inner, hidden_act="silu", mlp_bias=bias))
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        shape = (HIDDEN, inner) if name == "down_proj" else (inner, HIDDEN)
        linear = make_linear(shape, dtype=dtype, bias=bias, seed=seed)
        setattr(mlp, name, repack(linear, compute_dtype=dtype, storage_dtype=dtype))
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=["gate_proj", "up_proj", "down_proj"], **options)
    mlp.is_loaded_in_4bit = True  # makes PEFT take its layer for 4 bits
    inject_adapter_in_model(config, mlp)
    torch.manual_seed(3)
    for name, parameter in mlp.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn_like(parameter)).to(dtype)
    return mlp


def gradients_of(write: Callable[..., None], dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> list[torch.Tensor]:
    """Return dg and du, written over g and u and beside them with the same bits, and m, written over dm."""
    given = dm.clone()
    beside = [torch.empty_like(g), torch.empty_like(u)]
    write(dm, g, u, *beside, False)
    assert torch.equal(dm, given)
    over, m = [g.clone(), u.clone()], dm.clone()
    write(m, *over, *over, True)
    assert all(map(torch.equal, over, beside))
    return [*beside, m]


def adapter_of(mlp: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in mlp.named_parameters() if "lora_" in name]


def compute_in_float64(mlp: nn.Module, x: torch.Tensor, adapter: list[torch.Tensor]) -> torch.Tensor:
    pairs = zip(adapter[::2], adapter[1::2], strict=True)

    def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        base, (a, b) = layer.base_layer, next(pairs)
        bias = None if base.bias is None else base.bias.double()
        return nn.functional.linear(x, base.dequantize().double(), bias) + layer.scaling["default"] * (x @ a.T) @ b.T

    gate, up = run(mlp.gate_proj, x), run(mlp.up_proj, x)
    return run(mlp.down_proj, nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "x_wants_gradient"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("options", [{}, OF_EACH_ITS_OWN], ids=["alike", "of each its own"])
def test_it_is_no_less_exact_than_peft(dtype, bias, x_wants_gradient, options):
    mlp = make_mlp(dtype, bias, **options)
    adapter = adapter_of(mlp)
    x, dy = torch.randn(3, 20, HIDDEN, dtype=dtype), torch.randn(3, 20, HIDDEN, dtype=dtype)
    x.requires_grad_(x_wants_gradient)
    x64 = x.detach().double().requires_grad_(x_wants_gradient)
    adapter64 = [parameter.detach().double().requires_grad_() for parameter in adapter]
    exact = differentiate(lambda x: compute_in_float64(mlp, x, adapter64), x64, dy.double(), *adapter64)
    unfused = differentiate(mlp, x, dy, *adapter)
    report = fuse_lora(mlp)
    assert (report.num_fused, report.num_mlps) == (3, 1)
    fused = differentiate(mlp, x, dy, *adapter)
    assert len(fused) == len(exact) == (8 if x_wants_gradient else 7)
    for mine, theirs in zip(fused, unfused, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
    for mine, theirs in zip(error_of(fused, exact), error_of(unfused, exact), strict=True):
        assert mine <= 1.5 * theirs

    del mlp.forward  # the layers by themselves are fused still
    layer_by_layer = differentiate(mlp, x, dy, *adapter)
    for mine, theirs in zip(error_of(layer_by_layer, exact), error_of(unfused, exact), strict=True):
        assert mine <= 1.5 * theirs


def test_what_memory_held_before_is_not_computed_with(monkeypatch):
    """Room is left beside weights, inputs and gradients: nothing may be in there that zeros do not cancel."""

    def fill(self: torch.Tensor, *size: Any) -> torch.Tensor:
        return self.new_full(torch.Size(size if isinstance(size[0], int) else size[0]), float("nan"))

    mlp = make_mlp(torch.float32, bias=True, **OF_EACH_ITS_OWN)
    fuse_lora(mlp)
    monkeypatch.setattr(torch.Tensor, "new_empty", fill)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    for run in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=False)):
        results = differentiate(run, x, torch.ones(4, HIDDEN), *adapter_of(mlp))
        assert all(result.isfinite().all() for result in results)


def test_two_wide_tensors_are_kept_instead_of_four():
    mlp = make_mlp(torch.bfloat16)
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16, requires_grad=True)

    def count_wide() -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[0] == x.shape[0]:  # no weight
                kept[tensor.data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlp(x)
        return sum(storage.nbytes() // (4 * INNER * x.element_size()) for storage in kept.values())

    assert count_wide() == 4
    fuse_lora(mlp)
    assert count_wide() == 2


def test_gradients_are_written_over_what_is_there_for_one_backward_alone(monkeypatch):
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    in_place = []

    def write(dm, g, u, dg, du, make_m):
        in_place.append((g.data_ptr(), u.data_ptr()) == (dg.data_ptr(), du.data_ptr()))
        write_gradients(dm, g, u, dg, du, make_m)

    monkeypatch.setattr(swiglu, "write_gradients", write)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    for run in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=False)):
        y = run(x).sum()
        first, second = (torch.autograd.grad(y, [x, *adapter_of(mlp)], retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
    assert in_place == [False, False, True, True]


@pytest.mark.parametrize("frozen", range(6))
def test_only_what_is_trained_gets_a_gradient(frozen):
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    x = torch.randn(4, HIDDEN)
    mlp(x).sum().backward()
    adapter = adapter_of(mlp)
    expected = [parameter.grad for parameter in adapter]
    adapter[frozen].requires_grad_(False)
    for parameter in adapter:
        parameter.grad = None
    mlp(x).sum().backward()
    for index, (parameter, gradient) in enumerate(zip(adapter, expected, strict=True)):
        assert parameter.grad is None if index == frozen else torch.equal(parameter.grad, gradient)


def test_an_mlp_that_computes_something_else_is_left_alone():
    class Clamped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))

    for change in (lambda mlp: setattr(mlp, "__class__", Clamped), lambda mlp: setattr(mlp, "act_fn", nn.GELU())):
        mlp = make_mlp(torch.bfloat16)
        change(mlp)
        report = fuse_lora(mlp)
        assert (report.num_fused, report.num_mlps) == (3, 0)


def test_a_hook_on_a_layer_of_it_still_runs():
    mlp = make_mlp(torch.bfloat16)
    fuse_lora(mlp)
    assert isinstance(mlp.forward, FusedMLP)
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16)
    usual = mlp(x)
    handle = mlp.up_proj.register_forward_hook(lambda module, args, output: output * 0)
    assert not mlp(x).any()
    handle.remove()
    assert torch.equal(mlp(x), usual)
    unfuse_lora(mlp)
    assert "forward" not in mlp.__dict__ and "forward" not in mlp.up_proj.__dict__


def test_what_is_computed_again_ends_before_down(monkeypatch):
    mlp = make_mlp(torch.bfloat16)
    fuse_lora(mlp)
    adapter, counts = adapter_of(mlp), Counter()
    for name in ("gate_proj", "up_proj", "down_proj"):
        base = getattr(mlp, name).base_layer

        def count(*args, name=name, of=base.dequantize, **options):
            counts.update([name])
            return of(*args, **options)

        monkeypatch.setattr(base, "dequantize", count)
    passes = []

    def count_pass(g, u):
        passes.append(g.shape)
        return silu_product(g, u)

    monkeypatch.setattr(swiglu, "silu_product", count_pass)
    x, dy = torch.randn(2, 20, HIDDEN, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 20, HIDDEN).bfloat16()
    usual = differentiate(mlp, x, dy, *adapter)
    assert counts == {"gate_proj": 2, "up_proj": 2, "down_proj": 2} and len(passes) == 1
    counts.clear()
    again = differentiate(lambda x: checkpoint(mlp, x, use_reentrant=False), x, dy, *adapter)
    assert counts == {"gate_proj": 3, "up_proj": 3, "down_proj": 2} and len(passes) == 2
    assert all(map(torch.equal, again, usual))


class ReadsM(TorchDispatchMode):
    """Counts products of m, which is as wide as the MLP, with A of down."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.count += args[0].shape[1] == INNER and args[1].shape == (INNER, RANK)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_of_down_puts_out_is_computed_once(checkpointing):
    mlp = make_mlp(torch.bfloat16, **OF_EACH_ITS_OWN)
    fuse_lora(mlp)
    x = torch.randn(7, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with ReadsM() as seen:
        y = checkpoint(mlp, x, use_reentrant=False) if checkpointing else mlp(x)
        assert seen.count == 1
        y.sum().backward()
    assert seen.count == 1


@pytest.mark.parametrize("bias", [False, True])
def test_what_was_never_written_reaches_nobody(bias):
    """Room beside matrices is filled with NaN, and anomaly detection looks for it."""
    mlp = make_mlp(torch.float32, bias, **OF_EACH_ITS_OWN)
    fuse_lora(mlp)
    x, dy = torch.randn(4, HIDDEN, requires_grad=True), torch.randn(4, HIDDEN)
    for run in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=False)):
        expected = differentiate(run, x, dy, *adapter_of(mlp))
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            with torch.autograd.set_detect_anomaly(True):
                filled = differentiate(run, x, dy, *adapter_of(mlp))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(map(torch.equal, filled, expected))


@pytest.mark.parametrize("shape", [(0, HIDDEN), (2, 0, HIDDEN), (HIDDEN,)], ids=str)
def test_no_rows_and_a_single_one(shape):
    mlp = make_mlp(torch.float32)
    x = torch.randn(shape, requires_grad=True)
    expected = differentiate(mlp, x, torch.ones(shape), *adapter_of(mlp))
    fuse_lora(mlp)
    for mine, theirs in zip(differentiate(mlp, x, torch.ones(shape), *adapter_of(mlp)), expected, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_graph_can_be_used_twice():
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    y = mlp(x).sum()
    first, second = (torch.autograd.grad(y, [x, *adapter_of(mlp)], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.autograd.grad(y, mlp.up_proj.lora_A["default"].weight)[0], first[3])


def test_what_is_fetched_back_stays_until_gate_and_up_have_read_it():
    """TRL's activation offloading lets go of what a node's backward has fetched, unless its storage has more users.

    What it lets go of, it writes over, since it fetches on a stream of its own (`OffloadActivations`, `use_streams`).
    """
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    x, dy = torch.randn(4, HIDDEN, requires_grad=True), torch.randn(4, HIDDEN)
    expected = differentiate(mlp, x, dy, *adapter_of(mlp))

    def count_users(tensor: torch.Tensor) -> int:
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    def fetch(kept: torch.Tensor) -> torch.Tensor:
        fetched = kept.clone()
        num_users = count_users(fetched)

        def let_go(*_: Any) -> None:
            if count_users(fetched) <= num_users:
                fetched.fill_(float("nan"))

        torch._C._current_autograd_node().register_hook(let_go)
        return fetched

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, fetch):
        y = mlp(x)
    gradients = torch.autograd.grad(y, [x, *adapter_of(mlp)], dy)
    assert all(map(torch.equal, gradients, expected[1:]))


def test_hooks_that_return_what_was_written_over_are_told_so():
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        y = mlp(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must return new ones"):
        y.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_with_silu_and_its_gradients(dtype):
    g, u, dm = (torch.randn(3, 50, dtype=dtype) for _ in range(3))
    exact = [tensor.double().requires_grad_() for tensor in (g, u)]
    m = nn.functional.silu(exact[0]) * exact[1]
    expected = m.detach(), *torch.autograd.grad(m, exact, dm.double())
    y = torch.cat([g, u], dim=1).requires_grad_()
    side_by_side = SiluOfHalves.apply(y)
    halves = side_by_side, *torch.autograd.grad(side_by_side, y, dm)[0].chunk(2, dim=1)
    computed = silu_product(g, u), *gradients_of(write_gradients, dm, g, u), *halves
    for mine, theirs in zip(computed, [*expected, expected[0], *expected], strict=True):
        # Two roundings, and some more in float32; gradients by the largest term, which others may cancel.
        assert ((mine - theirs).abs() <= 3 * torch.finfo(dtype).eps * (theirs.abs() + dm.abs() * u.abs())).all()


def interpret() -> None:
    """Run the kernels in Triton's interpreter, in a process that was started with TRITON_INTERPRET=1.

    It cuts off what bfloat16 has no room for instead of rounding, so the other two dtypes are compared. Sizes: less
    than a program's, one more than a program's, several programs a row, nothing.
    """
    from hf_qlora_fsdp.kernels import silu_product as torch_ones
    from hf_qlora_fsdp.kernels import silu_product_triton as kernels

    torch.manual_seed(0)
    for dtype, shape in itertools.product([torch.float32, torch.float16], [(5, 7), (2, 2049), (3, 5000), (0, 8)]):
        g, u, dm = (4 * torch.randn(shape, dtype=dtype) for _ in range(3))
        mine = kernels.silu_product(g, u), *gradients_of(kernels.write_gradients, dm, g, u)
        theirs = (
            torch_ones.silu_product_in_parts(g, u),
            *gradients_of(torch_ones.write_gradients_in_parts, dm, g, u),
        )
        for one, other in zip(mine, theirs, strict=True):
            bound = 16 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
            assert ((one - other).abs() <= bound * (other.abs() + (dm * u).abs())).all(), (dtype, shape)
            assert dtype == torch.float32 or not one.numel() or (one != other).float().mean() < 1e-3
        halves = torch.cat([g, u], dim=1).chunk(2, dim=1)
        gradients = torch.empty(shape[0], 2 * shape[1], dtype=dtype)
        kernels.write_gradients(dm, *halves, *gradients.chunk(2, dim=1), False)
        assert torch.equal(kernels.silu_product(*halves), mine[0])
        assert torch.equal(gradients, torch.cat(mine[1:3], dim=1))

    launched: Counter[Any] = Counter()

    class Counting(kernels.Launcher):
        def __call__(self, num_programs, *tensors):
            could_be_compiled = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
            launched[self.kernel.fn.__name__, id(self)] += could_be_compiled
            super().__call__(num_programs, *tensors)

    kernels.Launcher = Counting
    kernels._prepare.cache_clear()
    assert torch_ones._find_kernels(torch.device("cpu")) is kernels
    assert {name for (name, _), number in launched.items() if number > 1} == {"_forward", "_backward"}  # both ways
    print("compared all shapes")


@needs_triton
def test_kernels_give_the_numbers_of_torch_in_the_interpreter():
    assert "compared all shapes" in run_interpreted(__name__)


def test_gradients_of_gradients_are_refused():
    """The functions compute with what autograd does not see: a second derivative would be wrong without a word."""
    mlp = make_mlp(torch.float32)
    fuse_lora(mlp)
    x, y = torch.randn(4, HIDDEN, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    inputs = {
        mlp: (mlp(x), x),
        mlp.up_proj: (mlp.up_proj(x), x),
        "group": (apply_lora_group(x, (mlp.gate_proj.forward.weights, mlp.up_proj.forward.weights), (1.0, 2.0))[1], x),
        "halves": (SiluOfHalves.apply(y), y),
    }
    for out, given in inputs.values():
        (gradient,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (64, 28672), (2048, 1000)])
def test_kernels_give_the_numbers_of_torch(dtype, shape):
    from hf_qlora_fsdp.kernels.silu_product import _find_kernels, silu_product_in_parts, write_gradients_in_parts

    assert _find_kernels(torch.device("cuda", 0)) is not None
    torch.manual_seed(0)
    g, u, dm = (4 * torch.randn(shape, dtype=dtype, device="cuda:0") for _ in range(3))
    mine = silu_product(g, u), *gradients_of(write_gradients, dm, g, u)
    theirs = silu_product_in_parts(g, u), *gradients_of(write_gradients_in_parts, dm, g, u)
    for one, other in zip(mine, theirs, strict=True):
        # Where float32 differs in its last bits, a 16-bit number may be the next one: rarely. Gradients may cancel.
        if dtype == torch.float32:
            assert ((one - other).abs() <= 16 * torch.finfo(dtype).eps * (other.abs() + (dm * u).abs())).all()
        else:
            assert torch.allclose(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            assert (one != other).float().mean() < 1e-3
    y = torch.cat([g, u], dim=1).requires_grad_()
    side_by_side = SiluOfHalves.apply(y)
    assert torch.equal(side_by_side, mine[0])
    assert torch.equal(torch.autograd.grad(side_by_side, y, dm)[0], torch.cat(mine[1:3], dim=1))

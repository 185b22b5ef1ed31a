"""Fused layers are used where they compute the same, and PEFT's own forward wherever a call asks for more.

What runs is seen by watching the function that `speed/fusion.py` calls. Where it must not run, outputs have to be those
of the layer as PEFT made it, bit for bit.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_qlora_fsdp.inputs import settle_liger
from hf_qlora_fsdp.packed_linear import repack
from hf_qlora_fsdp.speed import fusion
from hf_qlora_fsdp.speed.fusion import forget_outputs, fuse_lora, unfuse_lora
from tests.test_packing import make_linear
from tests.tiny import make_checkpoint

HIDDEN, INNER = 128, 192


class Layers(nn.Module):
    """One 4-bit layer with a bias, and one that is not in 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.is_loaded_in_4bit = True  # makes PEFT take its layer for 4 bits
        linear = make_linear((INNER, HIDDEN), bias=True)
        self.packed = repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
        self.plain = nn.Linear(HIDDEN, INNER, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x) + self.plain(x)


def add_adapter(model: nn.Module, **options: Any) -> PeftModel:
    """Return the model with an adapter in the dtype in which FSDP would gather it."""
    config = LoraConfig(**({"r": 4, "target_modules": ["packed"], "init_lora_weights": False} | options))
    return get_peft_model(model, config, autocast_adapter_dtype=False).bfloat16()


def make_model(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    return add_adapter(Layers(), **options)


def draw_input(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, 5, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """List the calls of the fused functions; they run all the same."""
    calls: list[str] = []
    for name in ("apply_lora_linear", "apply_swiglu"):
        original = getattr(fusion, name)

        def watch(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(fusion, name, watch)
    return calls


def assert_rounded_alike(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Two or three roundings to bfloat16, of 2^-9 on average, are between them."""
    assert (mine.float() - theirs.float()).norm() <= 2**-7 * theirs.float().norm()


def test_a_usual_layer_is_fused(fused_calls, caplog):
    model = make_model()
    expected = model(draw_input())
    with caplog.at_level(logging.INFO, "hf_qlora_fsdp"):
        report = fuse_lora(model)
    assert (report.num_fused, report.num_mlps, report.unfused.total()) == (1, 0, 0)
    assert caplog.messages == []
    y = model(draw_input())
    assert fused_calls == ["apply_lora_linear"]
    assert_rounded_alike(y, expected)
    with torch.inference_mode():
        assert torch.equal(model.eval()(draw_input()), y)
    unfuse_lora(model)
    assert torch.equal(model(draw_input()), expected)
    assert len(fused_calls) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "1 with dropout (lora_dropout=0 fuses them)"),
        ({"use_dora": True}, "1 with DoRA or another variant of LoRA"),
        ({"lora_bias": True}, "1 with lora_bias"),
        ({"bias": "all"}, "1 with a trained bias"),
        ({"target_modules": ["plain"]}, "1 around what is no packed 4-bit linear layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_fused_is_said_and_left_alone(options, reason, fused_calls, caplog):
    model = make_model(**options).eval()
    expected = model(draw_input())
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        report = fuse_lora(model)
    assert report.num_fused == 0
    assert caplog.messages == [f"PEFT's own forward, which is slower, runs in 1 of 1 LoRA layers: {reason}."]
    assert torch.equal(model(draw_input()), expected)
    assert fused_calls == []


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.packed


@contextmanager
def adapters_disabled(model):
    with model.disable_adapter():
        yield


@contextmanager
def another_adapter_active(model):
    model.set_adapter("other")
    yield
    model.set_adapter("default")


@contextmanager
def both_adapters_active(model):
    model.base_model.set_adapter(["default", "other"])
    yield
    model.set_adapter("default")


@contextmanager
def a_merged_adapter(model):
    layer_of(model).merged_adapters.append("default")
    yield
    layer_of(model).merged_adapters.clear()


@contextmanager
def a_hook(model):
    handle = layer_of(model).lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
    yield
    handle.remove()


@contextmanager
def a_trained_bias(model):
    layer_of(model).base_layer.bias.requires_grad_(True)
    yield
    layer_of(model).base_layer.bias.requires_grad_(False)


@contextmanager
def another_module_in_place_of_a(model):
    parts = layer_of(model).lora_A
    usual = parts["default"]
    parts["default"] = copy.deepcopy(usual)
    nn.init.ones_(parts["default"].weight)
    yield
    parts["default"] = usual


@contextmanager
def a_unit_of_its_own(model):
    """FSDP gives what becomes a unit another class."""
    part = layer_of(model).lora_B["default"]
    part.__class__ = type("FSDPLinear", (nn.Linear,), {})
    yield
    part.__class__ = nn.Linear


@contextmanager
def a_float32_adapter(model):
    layer_of(model).lora_A.float()
    layer_of(model).lora_B.float()
    yield
    layer_of(model).lora_A.bfloat16()
    layer_of(model).lora_B.bfloat16()


@contextmanager
def autocast_to_another_dtype(model):
    with torch.autocast("cpu", torch.float16):
        yield


STATES = [adapters_disabled, another_adapter_active, both_adapters_active, a_merged_adapter, a_hook, a_trained_bias]
STATES += [another_module_in_place_of_a, a_unit_of_its_own, a_float32_adapter, autocast_to_another_dtype]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_what_changes_from_call_to_call_is_looked_at_in_each(state, fused_calls):
    models = []
    for _ in range(2):
        model = make_model()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["packed"], init_lora_weights=False))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.bfloat16)
        models.append(model.eval())
    fused, plain = models
    assert fuse_lora(fused).num_fused == 1
    with state(fused), state(plain):
        assert torch.equal(fused(draw_input()), plain(draw_input()))
        assert fused_calls == []
    fused(draw_input())
    assert fused_calls == ["apply_lora_linear"]


@torch.no_grad()
def test_adapters_chosen_by_row(fused_calls):
    model = make_model().eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["packed"], init_lora_weights=False))
    model.bfloat16()
    names = ["default", "other", "__base__"]
    expected = model(draw_input(), adapter_names=names)
    fuse_lora(model)
    assert torch.equal(model(draw_input(), adapter_names=names), expected)
    assert fused_calls == []


def test_adapters_chosen_by_row_have_gradients():
    """PEFT adds each adapter's part to its rows in place, so what the layer puts out must not be a view."""
    model = make_model().eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["packed"], init_lora_weights=False))
    model.bfloat16()
    gradients = []
    for names in (["default"] * 3, ["default", "other", "default"]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name).grad = None
        model(draw_input(), adapter_names=names).float().square().sum().backward()
        layer = layer_of(model)
        gradients.append({name: layer.lora_B[name].weight.grad for name in ("default", "other")})
    assert gradients[0]["other"] is None or not gradients[0]["other"].any()
    assert gradients[1]["other"].any() and gradients[1]["default"].any()
    assert not torch.equal(gradients[0]["default"], gradients[1]["default"])


def test_numbers_in_another_dtype_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr(fusion, "_said", set())
    model = make_model()
    fuse_lora(model)
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"), a_float32_adapter(model):
        model(draw_input())
        model(draw_input())
    assert len(caplog.messages) == 1 and "adapter is in float32" in caplog.messages[0]


def test_a_copy_is_a_model_of_its_own(fused_calls):
    model = make_model()
    fuse_lora(model)
    before = model(draw_input())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(draw_input()), before)
    assert layer_of(copied).forward.layer is layer_of(copied)
    nn.init.zeros_(layer_of(copied).lora_B["default"].weight)
    assert not torch.equal(copied(draw_input()), before)
    assert torch.equal(model(draw_input()), before)
    assert len(fused_calls) == 4


def test_fusing_again_after_another_adapter_was_made_active(fused_calls):
    model = make_model()
    fuse_lora(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["packed"], init_lora_weights=False))
    model.bfloat16().set_adapter("other")
    expected = model(draw_input())
    assert fused_calls == []
    assert fuse_lora(model).num_fused == 1
    assert_rounded_alike(model(draw_input()), expected)
    assert fused_calls == ["apply_lora_linear"]


# ---- Layers that read one input --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What matters of one: three layers, called on one tensor, or each on one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.is_loaded_in_4bit = True
        for name, rows in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            linear = make_linear((rows, HIDDEN), dtype=torch.bfloat16)
            setattr(self, name, repack(linear, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16))
        self.apart = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        others = (x.clone(), x.clone()) if self.apart else (x, x)
        return torch.cat([self.q_proj(x), self.k_proj(others[0]), self.v_proj(others[1])], dim=-1)


@pytest.fixture
def group_calls(monkeypatch) -> list[int]:
    """List how many layers each call of the function was given."""
    calls: list[int] = []
    original = fusion.apply_lora_group
    monkeypatch.setattr(
        fusion,
        "apply_lora_group",
        lambda x, layers, scalings: calls.append(len(layers)) or original(x, layers, scalings),
    )
    return calls


def make_attention() -> PeftModel:
    torch.manual_seed(0)
    return add_adapter(Attention(), target_modules=["q_proj", "k_proj", "v_proj"])


def test_layers_that_read_one_input_run_as_one(group_calls, fused_calls):
    model = make_attention()
    expected = model(draw_input())
    report = fuse_lora(model)
    assert (report.num_fused, report.num_groups) == (3, 1)
    for _ in range(2):
        assert_rounded_alike(model(draw_input()), expected)
    assert group_calls == [3, 3] and fused_calls == []
    attention = model.base_model.model
    group = attention.q_proj.forward.group
    assert group.x is None and not group.kept  # nothing is held beyond the calls


def test_layers_that_do_not_read_one_input_go_on_by_themselves(group_calls, fused_calls):
    model = make_attention()
    fuse_lora(model)
    together = model(draw_input())
    model.base_model.model.apart = True
    for _ in range(4):
        assert_rounded_alike(model(draw_input()), together)
    assert group_calls == [3, 3, 3]  # found out by what two calls left
    assert len(fused_calls) == 2 + 2 + 3 + 3


def test_a_group_survives_an_exception_between_its_calls(group_calls):
    model = make_attention()
    fuse_lora(model)
    expected = model(draw_input())
    attention = model.base_model.model
    handle = attention.k_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(draw_input())
    handle.remove()
    for _ in range(2):
        assert torch.equal(model(draw_input()), expected)
    assert group_calls == [3, 3, 3, 3]


def test_a_step_that_is_left_between_the_calls_of_a_group_can_be_freed():
    """What is kept for the calls to come hangs on the graph of the whole step, which may have been left for memory."""
    model = make_attention()
    fuse_lora(model)
    handle = model.base_model.model.k_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    x = draw_input().requires_grad_() * 1
    held = weakref.ref(x)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    del x
    gc.collect()
    assert held() is not None
    forget_outputs(model)
    gc.collect()
    assert held() is None


def test_a_layer_that_wants_something_else_takes_the_group_apart(group_calls):
    model = make_attention()
    fuse_lora(model)
    handle = model.base_model.model.k_proj.lora_A["default"].register_forward_hook(lambda m, args, y: y * 0)
    without = model(draw_input())
    handle.remove()
    assert group_calls == []
    assert not torch.equal(model(draw_input()), without) and group_calls == [3]


# ---- Beside Liger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "given", "num_mlps", "num_norms", "device_type", "settled", "said"),
    [
        (True, None, 2, 0, "cuda", {"swiglu": False}, "all but its SwiGLU"),
        (True, {"rope": False}, 2, 0, "cpu", {"rope": False, "swiglu": False}, "all but its SwiGLU"),
        (True, {"swiglu": False}, 2, 0, "cuda", {"swiglu": False}, None),
        (True, {"swiglu": False}, 2, 5, "cuda", {"swiglu": False, "rms_norm": False}, "all but its RMSNorm"),
        (True, {"rms_norm": False}, 0, 5, "cuda", {"rms_norm": False}, None),
        (True, None, 0, 0, "cuda", None, None),
        (False, None, 2, 0, "cuda", None, "RMSNorm and rotary embedding run in many kernels"),
        (False, None, 2, 5, "cuda", None, "Rotary embedding runs in many kernels"),
        (False, None, 2, 5, "cpu", None, None),
    ],
)
def test_liger_leaves_alone_what_is_fused(used, given, num_mlps, num_norms, device_type, settled, said, caplog):
    """It would put another forward in the place of theirs, when training begins, without a word."""
    args: Any = SimpleNamespace(use_liger_kernel=used, liger_kernel_config=given)
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        settle_liger(args, num_mlps, num_norms, device_type)
    assert args.liger_kernel_config == settled
    assert len(caplog.messages) == (said is not None) and all(said in line for line in caplog.messages)


# ---- On the ranks ----------------------------------------------------------------------------------------------------


def compare_sharded(rank: int, folder: str, how: str) -> dict[str, Any]:
    """Train one step unfused and fused, in bfloat16, and one unfused in float32; say what came out."""
    from hf_qlora_fsdp.sharding_policy import ShardingPolicy
    from tests.test_sharding import BUILDERS, INPUT_IDS, LORA, checkpoint_activations, draw_adapter, step

    def compute(model):
        return step(model, INPUT_IDS[rank : rank + 1])

    results: dict[str, Any] = {}
    for dtype, name in ((torch.float32, "exact"), (torch.bfloat16, "unfused")):
        model = BUILDERS[how](folder, LoraConfig(**LORA), ShardingPolicy(param_dtype=dtype), torch.uint8).train()
        draw_adapter(model)
        results[name] = compute(model)
    report = fuse_lora(model)
    results["num_fused"], results["num_mlps"] = report.num_fused, report.num_mlps
    results["num_unfused"] = report.unfused.total()
    results["fused"] = compute(model)
    checkpoint_activations(model)
    results["checkpointed"] = compute(model)
    return results


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_sharded_model_has_the_same_gradients(ranks, tmp_path, family):
    """Of each of its adapter's tensors, no further from float32 than without fusing, and the same if recomputed."""
    folder = make_checkpoint(tmp_path, family)
    for computed in ranks.run(compare_sharded, folder, "load"):
        assert (computed["num_fused"], computed["num_unfused"]) == (14, 0)
        assert computed["num_mlps"] == (0 if family == "gemma2" else 2)  # gemma's is gated by another function
        exact, unfused, fused, checkpointed = (
            computed[name]["gradients"] for name in ("exact", "unfused", "fused", "checkpointed")
        )
        assert len(exact) == len(fused) == 28
        for name, true in exact.items():
            assert torch.equal(fused[name], checkpointed[name])
            assert (fused[name] - true).norm() <= 1.5 * (unfused[name] - true).norm(), name


def test_adapters_that_are_units_of_their_own_are_not_fused(ranks, tmp_path):
    folder = make_checkpoint(tmp_path, "llama")
    for computed in ranks.run(compare_sharded, folder, "adapter afterwards"):
        assert (computed["num_fused"], computed["num_mlps"], computed["num_unfused"]) == (0, 0, 14)
        for name, gradient in computed["unfused"]["gradients"].items():
            assert torch.equal(computed["fused"]["gradients"][name], gradient)

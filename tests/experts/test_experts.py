"""Experts in 4 bits compute what the same experts do dequantised, with stock PEFT's LoRA on them.

The reference is upstream's own model: its experts hold the dequantised values, its LoRA is PEFT's
(`target_parameters`), it runs in one process. Against the same in float64, ours may err half as much again as that
reference does in float32, and by the rounding of the result itself.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_qlora_fsdp.anatomy import plan_units
from hf_qlora_fsdp.experts.layers import PROJECTIONS, Experts4bit, fused_experts, pack_experts
from hf_qlora_fsdp.experts.lora import ParamWrapper
from hf_qlora_fsdp.inputs import leave_experts_to_us
from hf_qlora_fsdp.mesh import make_mesh
from hf_qlora_fsdp.sharding import check_sharded, shard_root, shard_unit
from hf_qlora_fsdp.sharding_policy import ShardingPolicy
from hf_qlora_fsdp.speed.fusion import fuse_lora
from tests.distributed import RankPool
from tests.tiny import draw_parameters

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 128, 192
SLACK = 1.5
TARGETS = [f"mlp.experts.{name}" for name in PROJECTIONS]

# Five tokens to one expert each leave at least three experts without any.
CASES = [
    ("mixtral", 2, "eager", False),
    ("mixtral", 1, "grouped_mm", True),
    ("qwen3_moe", 2, "grouped_mm", False),
    ("gpt_oss", 1, "eager", True),
    ("gpt_oss", 2, "grouped_mm", False),
]


def make_moe(
    model_type: str, top_k: int = 2, implementation: str = "eager", dtype: Any = torch.float32, **more: Any
) -> Any:
    """A tiny frozen model of experts, all its parameters drawn."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096 * 32,
        "num_local_experts": NUM_EXPERTS,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": top_k,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **sizes | more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation)
    draw_parameters(model, seed=0)
    return model.requires_grad_(False)


def pack_and_dequantize(model: PreTrainedModel, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Return a copy with its experts packed, and give the original what they hold."""
    packed = copy.deepcopy(model)
    for name, module in list(fused_experts(packed)):
        experts = pack_experts(module, compute_dtype=dtype, storage_dtype=dtype, **options)
        packed.set_submodule(name, experts)
        for projection in PROJECTIONS:
            getattr(model.get_submodule(name), projection).data = experts.dequantize(projection)
    return packed


def add_lora(model: PreTrainedModel, ours: bool, rank: int = 8) -> PeftModel:
    """Put LoRA on attention and on experts, and draw both of its factors."""
    config = LoraConfig(r=rank, lora_alpha=12, target_modules=["q_proj"], target_parameters=TARGETS)
    if ours:
        config._register_custom_module({Experts4bit: ParamWrapper})
    peft_model = get_peft_model(model, config)
    draw_adapter(peft_model)
    return peft_model


@torch.no_grad()
def draw_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def enable_checkpointing(model: PeftModel) -> None:
    base: Any = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()


def tokens(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (1, num), generator=torch.Generator().manual_seed(seed))


def run(model: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the logits of the last batch and the gradients of the mean loss, in float64."""
    for ids in batches:
        output = model(input_ids=ids, labels=ids)
        (output.loss / len(batches)).backward()
    found = {"logits": output.logits}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            grad = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {name: value.detach().double() for name, value in found.items()}


def exact(model: Any) -> Any:
    """Return a copy in float64, which grouped_mm does not take."""
    twin = copy.deepcopy(model).double()
    (twin.get_base_model() if isinstance(twin, PeftModel) else twin).set_experts_implementation("eager")
    return twin


def errors(ours: dict[str, torch.Tensor], stock: Any, batches: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return, for everything that was computed, the error of ours and the largest that it may have."""
    expected = run(exact(stock), batches)
    reference = run(copy.deepcopy(stock), batches)
    assert ours.keys() == expected.keys()
    found = {}
    for name, value in expected.items():
        allowed = SLACK * (reference[name] - value).norm() + torch.finfo(torch.float32).eps * value.norm()
        found[name] = (float((ours[name] - value).norm()), float(allowed))
    return found


def check(found: dict[str, tuple[float, float]]) -> None:
    assert {name: pair for name, pair in found.items() if not pair[0] <= pair[1]} == {}


@pytest.mark.parametrize(("model_type", "top_k", "implementation", "checkpointing"), CASES)
def test_logits_and_gradients(model_type: str, top_k: int, implementation: str, checkpointing: bool) -> None:
    model = make_moe(model_type, top_k, implementation)
    ours, stock = add_lora(pack_and_dequantize(model), ours=True), add_lora(model, ours=False)
    if checkpointing:
        enable_checkpointing(ours)
    pairs = []
    for seed in range(4):  # how sums are rounded depends on where memory lies; over several batches that evens out
        batch = tokens(5, seed)
        ours.zero_grad()
        found = run(ours, [batch])
        pairs.append(errors(found, stock, [batch]))
    check(
        {
            name: tuple(math.hypot(*of_each) for of_each in zip(*(one[name] for one in pairs), strict=True))
            for name in found
        }
    )
    grads = [value.unflatten(0, (NUM_EXPERTS, -1)) for name, value in found.items() if "experts.lora_A" in name]
    hit = [grad.flatten(1).any(1) for grad in grads]
    assert len(hit) == 2 and all(bool(mask.any()) for mask in hit)
    if top_k == 1:
        assert all(int(mask.sum()) <= 5 for mask in hit)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_gradients_of_the_input_and_of_the_router(model_type: str) -> None:
    """Without LoRA, alone: what flows through packed weights, and to the weights of the experts' results."""
    model = make_moe(model_type)
    (_, ours), *_ = [pair for pair in pack_and_dequantize(model).named_modules() if isinstance(pair[1], Experts4bit)]
    (_, stock), *_ = fused_experts(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(6)])
    weights, grad = torch.rand(6, 2, generator=generator), torch.randn(6, HIDDEN, generator=generator)
    found = []
    for module, dtype in (
        (ours, torch.float32),
        (stock, torch.float32),
        (copy.deepcopy(stock).double(), torch.float64),
    ):
        inputs = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        found.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for one, reference, value in zip(*found, strict=True):
        error, allowed = (one - value).norm(), SLACK * (reference - value).norm() + 2**-23 * value.norm()
        assert error <= allowed
    nothing = x[:0].requires_grad_()
    y = ours(nothing, index[:0], weights[:0])
    assert y.shape == torch.autograd.grad(y.sum(), nothing)[0].shape == (0, HIDDEN)


def test_bfloat16_is_as_close_as_upstream() -> None:
    model = make_moe("mixtral", 2, "grouped_mm", torch.bfloat16)
    packed = pack_and_dequantize(model, torch.bfloat16)
    batch = tokens(16)
    logits = exact(model)(batch).logits
    error, allowed = ((other(batch).logits - logits).norm() for other in (packed, model))
    assert error <= SLACK * allowed


def test_stock_peft_loads_what_is_saved_and_the_other_way_round(tmp_path: Any) -> None:
    model = make_moe("mixtral")
    packed = pack_and_dequantize(model)
    batch = tokens(7)
    ours = add_lora(copy.deepcopy(packed), ours=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    saved = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, saved[name])
    expected = stock(batch).logits
    torch.testing.assert_close(ours(batch).logits, expected)
    stock.save_pretrained(tmp_path / "stock")
    config = LoraConfig.from_pretrained(tmp_path / "stock")
    config._register_custom_module({Experts4bit: ParamWrapper})
    again = PeftModel.from_pretrained(packed, tmp_path / "stock", config=config).eval()
    assert torch.equal(again(batch).logits, ours(batch).logits)
    with again.disable_adapter():
        torch.testing.assert_close(again(batch).logits, model(batch).logits)
    assert isinstance(again.base_model.model.model.layers[0].mlp.experts, ParamWrapper)
    with pytest.raises(ValueError, match="hf-qlora-fsdp merge"):
        again.merge_adapter()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that are allocated inside, and not freed, at the worst moment: on the host nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = self._storage(leaf) if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    @staticmethod
    def _storage(tensor: torch.Tensor) -> Any:
        return tensor.untyped_storage()

    def _free(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.now -= num_bytes


@functools.cache
def chunked_experts(chunk_bytes: int) -> Experts4bit:
    packed: Any = pack_and_dequantize(make_moe("qwen3_moe"), chunk_bytes=chunk_bytes)
    return packed.model.layers[0].mlp.experts


@pytest.mark.parametrize("num_experts_a_chunk", [0, 1, 3])
def test_transient_is_that_of_the_docstring(num_experts_a_chunk: int) -> None:
    one_expert = 2 * INTERMEDIATE * HIDDEN * 4
    chunk_bytes = num_experts_a_chunk * one_expert
    experts = chunked_experts(chunk_bytes)
    x = torch.randn(NUM_EXPERTS, HIDDEN).requires_grad_()
    index, weights = torch.arange(NUM_EXPERTS)[:, None], torch.ones(NUM_EXPERTS, 1)
    with PeakMemory() as memory:
        y = experts(x, index, weights)
        torch.autograd.grad(y.sum(), x)
    formula = max(chunk_bytes, one_expert) * (1 + 4 / (64 * 4))
    activations = 4 * NUM_EXPERTS * (4 * HIDDEN + 8 * INTERMEDIATE)  # with their gradients, at most
    assert max(chunk_bytes, one_expert) < memory.peak <= formula + activations
    assert activations < one_expert / 2, "or a chunk could hide in them"


def test_only_hit_experts_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = chunked_experts(0)
    made: list[tuple[str, int, int | None]] = []
    dequantize = Experts4bit.dequantize

    def recording(self: Any, name: str, start: int = 0, stop: int | None = None, dtype: Any = None) -> torch.Tensor:
        made.append((name, start, stop))
        return dequantize(self, name, start, stop, dtype)

    monkeypatch.setattr(Experts4bit, "dequantize", recording)
    x, weights = torch.randn(3, HIDDEN), torch.ones(3, 1)
    experts(x, torch.tensor([[5], [2], [5]]), weights)
    assert made == [(name, expert, expert + 1) for name in PROJECTIONS for expert in (2, 5)]


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    (_, experts), *_ = fused_experts(make_moe("mixtral"))
    experts.has_gate = False
    assert 2 * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE == 1.125 * 2**20
    with pytest.raises(ValueError, match=r"MixtralExperts has no gate.*1\.1 MiB"):
        Experts4bit(experts, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    (_, experts), *_ = fused_experts(make_moe("gpt_oss"))
    packed = pack_experts(experts, compute_dtype=torch.float32, storage_dtype=torch.float32)
    config = LoraConfig(r=4, target_parameters=["experts.down_proj_bias"])
    config._register_custom_module({Experts4bit: ParamWrapper})
    with pytest.raises(ValueError, match=r"down_proj_bias.*gate_up_proj"):
        get_peft_model(nn.ModuleDict({"experts": packed}), config)


@pytest.mark.parametrize("given", [None, {"swiglu": True, "rope": False}])
def test_others_leave_experts_alone(given: dict[str, bool] | None) -> None:
    """Liger would replace their forward, and ours, which is fused in its own way, is nothing that was left unfused."""
    model = add_lora(pack_and_dequantize(make_moe("mixtral")), ours=True)
    args: Any = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=given)
    leave_experts_to_us(model, args)
    assert args.liger_kernel_config == {**(given or {}), "swiglu": False}
    assert fuse_lora(model).unfused.total() == 2  # the query projections, which are not packed here


# ---- Two ranks -------------------------------------------------------------------------------------------------------


def shard(model: PeftModel, policy: ShardingPolicy) -> PeftModel:
    mesh, base = make_mesh(), model.get_base_model()
    for unit in plan_units(base):
        shard_unit(base, unit, policy, mesh, set())
    shard_root(model, policy, mesh, set())
    check_sharded(model, policy)
    return model


def sharded_errors(
    rank: int, case: tuple[str, int, str, bool], offload: bool, num_hit: int = NUM_EXPERTS
) -> dict[str, tuple[float, float]]:
    model_type, top_k, implementation, checkpointing = case
    model = make_moe(model_type, top_k, implementation)
    if num_hit == 2:  # opposite logits: one of the two is positive, and all others are zero
        for layer in model.model.layers:
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0
    ours, stock = add_lora(pack_and_dequantize(model), ours=True), add_lora(model, ours=False)
    shard(ours, ShardingPolicy(param_dtype=torch.float32, cpu_offload=offload))
    if checkpointing:
        enable_checkpointing(ours)
    batches = [tokens(5, seed=other) for other in range(2)]
    found = run(ours, [batches[rank]])
    for name, grad in found.items():
        if "experts" in name and num_hit < NUM_EXPERTS:
            of_expert = (
                grad.unflatten(0, (NUM_EXPERTS, -1))
                if "lora_A" in name
                else grad.unflatten(1, (-1, NUM_EXPERTS)).permute(2, 0, 1)
            )
            assert of_expert[:num_hit].flatten(1).any(1).all() and not of_expert[num_hit:].any()
    batches.append(batches.pop(rank))  # the logits that are compared are those of this rank
    return errors(found, stock, batches)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_sharded_over_two_ranks(ranks: RankPool, case: tuple[str, int, str, bool], offload: bool) -> None:
    for found in ranks.run(sharded_errors, case, offload):
        check(found)


def errors_where_nothing_divides(rank: int) -> dict[str, tuple[float, float]]:
    sizes = {"num_local_experts": 5, "num_experts": 5, "intermediate_size": 160, "hidden_size": 100, "head_dim": 28}
    model = make_moe("mixtral", 2, "grouped_mm", **sizes)
    ours, stock = add_lora(pack_and_dequantize(model, chunk_bytes=1), True, 3), add_lora(model, False, 3)
    shard(ours, ShardingPolicy(param_dtype=torch.float32))
    batches = [tokens(2 + 4 * other, seed=other) for other in range(2)]
    found = run(ours, [batches[rank]])
    batches.append(batches.pop(rank))
    return errors(found, stock, batches)


def test_shapes_that_nothing_divides(ranks: RankPool) -> None:
    """Five experts and 15 rows of factors over two ranks, rows of one block and a half, two tokens on one rank."""
    for found in ranks.run(errors_where_nothing_divides):
        check(found)


def test_experts_that_no_rank_sends_a_token_to(ranks: RankPool) -> None:
    """Their gradients are zero, not missing and not what lay in memory."""
    for found in ranks.run(sharded_errors, CASES[1], True, 2):
        check(found)


def sharded_and_whole(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack_and_dequantize(make_moe("mixtral", dtype=torch.bfloat16), torch.bfloat16)
    model, batch = add_lora(packed, ours=True), tokens(9, seed=rank)
    masters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in masters:
            parameter.data = parameter.data.bfloat16()
        whole = model(batch).logits
        for parameter in masters:
            parameter.data = parameter.data.float()
        return whole, shard(model, ShardingPolicy())(batch).logits


def test_packed_bytes_survive_sharding_in_bfloat16(ranks: RankPool) -> None:
    for whole, sharded in ranks.run(sharded_and_whole):
        assert torch.equal(whole, sharded)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_on_a_gpu(implementation: str) -> None:
    model = make_moe("qwen3_moe", 1, implementation, torch.bfloat16).cuda()
    ours, stock = add_lora(pack_and_dequantize(model, torch.bfloat16), ours=True), add_lora(model, ours=False)
    batch = tokens(5).cuda()
    expected = run(exact(stock), [batch])
    found, reference = run(ours, [batch]), run(stock, [batch])
    for name, value in expected.items():
        allowed = SLACK * (reference[name] - value).norm() + torch.finfo(torch.bfloat16).eps * value.norm()
        assert (found[name] - value).norm() <= allowed, name


def test_a_model_in_memory_that_keeps_its_experts_in_16_bits_is_refused():
    from hf_qlora_fsdp.sharding import _check_quantized
    from tests.test_packing import make_linear

    model = nn.ModuleDict({"q_proj": make_linear((64, 64)), "experts": nn.Module()})
    model["experts"].gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"'experts' and so on\) in 16 bits, 512 B of them.*Pass its name or folder"):
        _check_quantized(model)

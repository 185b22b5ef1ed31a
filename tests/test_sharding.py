"""Sharded over two ranks, a model computes what it computes whole: the same logits, losses and adapter gradients.

Equal losses hide wrong gradients, so every gradient of every adapter weight is compared. There are two references, both
one process with bitsandbytes' own layers under PEFT's own adapter:

* **float32, the whole batch at once.** Differences are only those of the order of sums.
* **bfloat16, a row at a time**, as each rank has one, with the two gradients averaged in float32. Then every operation
  is the same on the same numbers, and nothing may differ by a single bit.

B is not zero in any of them: with the usual start every gradient of A is zero, and zeros are equal to anything.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_qlora_fsdp import sharding
from hf_qlora_fsdp.anatomy import plan_units
from hf_qlora_fsdp.errors import ShardingError
from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.loading.adapters import initialize_adapter, inject_adapter
from hf_qlora_fsdp.mesh import make_mesh, mesh_device
from hf_qlora_fsdp.packed_linear import PackedLinear4bit, repack
from hf_qlora_fsdp.packing import dequantize
from hf_qlora_fsdp.sharding import (
    base_model,
    check_sharded,
    check_storage_dtype,
    is_sharded,
    shard_adapters,
    shard_model,
    shard_root,
)
from hf_qlora_fsdp.sharding_policy import ShardingPolicy
from tests.tiny import VOCAB_SIZE, make_checkpoint

# One row a rank, of equal length, so that the mean over ranks is the mean over tokens.
INPUT_IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Tensors = dict[str, torch.Tensor]
Computed = dict[str, Any]


def draw_adapter(model: nn.Module) -> None:
    """Give every adapter weight, whole or sharded, the values that belong to its name."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(index)
            values = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)


def step(model: nn.Module, rows: torch.Tensor) -> Computed:
    """Run a forward and a backward; return logits, loss and every gradient, whole and in float32."""
    model.zero_grad()
    output = model(input_ids=rows, labels=rows)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad.full_tensor() if isinstance(parameter, DTensor) else parameter.grad
            gradients[name] = gradient.detach().float().clone()
    return {"logits": output.logits.detach().clone(), "loss": output.loss.detach().clone(), "gradients": gradients}


def checkpoint_activations(model: nn.Module) -> None:
    base = base_model(model)
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )  # the old name
    enable({"use_reentrant": False})


# ---- On the ranks ----------------------------------------------------------------------------------------------------


def compute_sharded(rank: int, folder: str, variants: list[dict[str, Any]]) -> list[Computed]:
    return [compute_one(rank, folder, **variant) for variant in variants]


def compute_one(
    rank: int,
    folder: str,
    how: str = "load",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    offload: bool = False,
    policy: dict[str, Any] | None = None,
    reshard: bool = True,
    storage: torch.dtype = torch.uint8,
    **lora: Any,
) -> Computed:
    """Bring a model with an adapter onto the ranks in the way that `how` names, and run a step of one row a rank."""
    changes = {"cpu_offload": offload, "reshard_after_forward": reshard, **(policy or {})}
    settings = ShardingPolicy(param_dtype=dtype, **changes)
    config = LoraConfig(**(LORA | lora))
    model = BUILDERS[how](folder, config, settings, storage)
    draw_adapter(model)
    check_sharded(model, settings)
    if checkpointing:
        checkpoint_activations(model)
    computed = step(model.train(), INPUT_IDS[rank : rank + 1])
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    computed["again"] = step(model, INPUT_IDS[rank : rank + 1])["loss"]
    return computed


def build_by_loading(folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype) -> nn.Module:
    return load_quantized_model(folder, peft_config=config, policy=policy, progress=False)


def build_with_adapter_afterwards(
    folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype
) -> nn.Module:
    base = load_quantized_model(folder, policy=policy, progress=False)
    model, mesh = inject_adapter(base, config), make_mesh()
    initialize_adapter(model, config, mesh_device(mesh))
    for unit in plan_units(base, policy.class_names):
        shard_adapters([base.get_submodule(name) for name in unit.modules], policy, mesh)
    shard_root(model, policy, mesh, set())
    return model


def build_with_adapters_as_units(
    folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype
) -> nn.Module:
    """What offloading does to the units, without offloading."""
    from hf_qlora_fsdp import sharding

    shard_unit = sharding.shard_unit

    def shard_adapters_first(model, unit, policy, mesh, ignored, store):
        shard_adapters([model.get_submodule(name) for name in unit.modules], policy, mesh)
        shard_unit(model, unit, policy, mesh, ignored, store)

    model = whole_model(folder, policy.param_dtype, storage)
    sharding.shard_unit = shard_adapters_first
    try:
        return shard_model(get_peft_model(model, config), policy)
    finally:
        sharding.shard_unit = shard_unit


def build_from_whole_model(folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype) -> nn.Module:
    """A script's model, with an adapter put in as the trainer does it."""
    return shard_model(inject_adapter(whole_model(folder, policy.param_dtype, storage), config), policy)


def build_from_peft_model(folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype) -> nn.Module:
    return shard_model(get_peft_model(whole_model(folder, policy.param_dtype, storage), config), policy)


def build_after_preparation(folder: str, config: LoraConfig, policy: ShardingPolicy, storage: torch.dtype) -> nn.Module:
    """PEFT's preparation casts norms, embeddings and head to float32; sharding has to put that right again."""
    model = whole_model(folder, policy.param_dtype, storage)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert prepared.model.norm.weight.dtype == torch.float32
    return shard_model(get_peft_model(prepared, config), policy)


BUILDERS = {
    "load": build_by_loading,
    "adapter afterwards": build_with_adapter_afterwards,
    "adapter units": build_with_adapters_as_units,
    "whole": build_from_whole_model,
    "peft": build_from_peft_model,
    "prepared": build_after_preparation,
}


# ---- In one process --------------------------------------------------------------------------------------------------


def whole_model(folder: str, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def reference_model(folder: str, dtype: torch.dtype, **lora: Any) -> PeftModel:
    """One process, bitsandbytes' layers, PEFT's adapter in the dtype that the sharded one is gathered in."""
    model = get_peft_model(whole_model(folder, dtype), LoraConfig(**LORA, **lora), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    draw_adapter(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def assert_identical(mine: Computed, theirs: Computed) -> None:
    assert torch.equal(mine["logits"], theirs["logits"])
    assert torch.equal(mine["loss"], theirs["loss"])
    assert set(mine["gradients"]) == set(theirs["gradients"])
    for name, gradient in theirs["gradients"].items():
        assert torch.equal(mine["gradients"][name], gradient), name


def row_by_row(model: PeftModel) -> list[Computed]:
    """Return for each rank its row's logits and loss, and the gradients averaged as the ranks average them."""
    steps = [step(model, INPUT_IDS[row : row + 1]) for row in range(2)]
    first, second = (computed["gradients"] for computed in steps)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    return [{**computed, "gradients": mean} for computed in steps]


CHECKPOINTING = [False, True]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
class TestAgainstOneProcess:
    def test_bfloat16_bit_for_bit(self, ranks, tmp_path, family, tie):
        folder = make_checkpoint(tmp_path, family, tie=tie)
        expected = row_by_row(reference_model(folder, torch.bfloat16))
        assert all(gradient.any() for gradient in expected[0]["gradients"].values())
        variants = [{"dtype": torch.bfloat16, "checkpointing": checkpointing} for checkpointing in CHECKPOINTING]
        for rank, results in enumerate(ranks.run(compute_sharded, folder, variants)):
            for computed in results:
                assert_identical(computed, expected[rank])
                assert torch.equal(computed["again"], computed["loss"])

    def test_float32_against_the_whole_batch(self, ranks, tmp_path, family, tie):
        folder = make_checkpoint(tmp_path, family, tie=tie)
        model = reference_model(folder, torch.float32)
        expected, by_row = step(model, INPUT_IDS), row_by_row(model)
        variants = [{"checkpointing": checkpointing} for checkpointing in CHECKPOINTING]
        results = ranks.run(compute_sharded, folder, variants)
        for variant in range(2):
            computed = [results[rank][variant] for rank in range(2)]
            for rank in range(2):
                assert_identical(computed[rank], by_row[rank])
            # A batch of two multiplies matrices of another shape, whose sums may run in another order. Every number
            # here is a sum of at most 512 products (the vocabulary) behind 2 layers of 7 such sums, there and back:
            # some 30 steps. The roundings of a sum of n terms are as a random walk, the root of n of them. What is to
            # be found is far beyond: a gradient that lacks a rank, or is summed and not averaged, is 0.5 off.
            bound = 30 * 512**0.5 * torch.finfo(torch.float32).eps
            assert_close(torch.cat([c["logits"] for c in computed]), expected["logits"], bound)
            assert_close(sum(c["loss"] for c in computed) / 2, expected["loss"], bound)
            for name, gradient in expected["gradients"].items():
                assert_close(computed[0]["gradients"][name], gradient, bound)


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


# ---- Ways to the same sharded model ----------------------------------------------------------------------------------

WAYS = [
    {"offload": True},
    {"reshard": False},
    {"how": "adapter afterwards"},
    {"how": "adapter afterwards", "offload": True},
    {"how": "adapter units"},
    {"how": "whole"},
    {"how": "whole", "storage": torch.bfloat16},
    {"how": "peft"},
    {"how": "peft", "storage": torch.float32, "offload": True},
    {"how": "prepared", "storage": torch.bfloat16},
]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_all_ways_lead_to_the_same_numbers(ranks, tmp_path, tie):
    folder = make_checkpoint(tmp_path, "qwen2", tie=tie)
    variants = [{"dtype": torch.bfloat16, **way} for way in ({}, *WAYS)]
    for first, *others in ranks.run(compute_sharded, folder, variants):
        for way, other in zip(WAYS, others, strict=True):
            try:
                assert_identical(other, first)
            except AssertionError as error:
                raise AssertionError(f"{way}: {error}") from error


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_gradient_of_a_trained_head_is_reduced(ranks, tmp_path, tie):
    folder = make_checkpoint(tmp_path, "llama", tie=tie)
    lora = {"modules_to_save": ["lm_head"]}
    expected = row_by_row(reference_model(folder, torch.bfloat16, **lora))
    (head,) = (name for name in expected[0]["gradients"] if "lm_head" in name)
    assert expected[0]["gradients"][head].any()
    ways = [{"how": how} for how in ("load", "peft", "whole")] + [{"offload": True}]
    variants = [{"dtype": torch.bfloat16, **way, **lora} for way in ways]
    for rank, results in enumerate(ranks.run(compute_sharded, folder, variants)):
        for computed in results:
            assert_identical(computed, expected[rank])


def count_gathered(rank: int, folder: str) -> list[str]:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    model = load_quantized_model(folder, peft_config=LoraConfig(**LORA), progress=False)
    gathered, gather = [], group.foreach_all_gather

    def count(params: list[Any], *rest: Any) -> Any:
        gathered.append(params[0]._param_fqn)
        return gather(params, *rest)

    loss = model(input_ids=INPUT_IDS[rank : rank + 1], labels=INPUT_IDS[rank : rank + 1]).loss
    group.foreach_all_gather = count
    try:
        loss.backward()
    finally:
        group.foreach_all_gather = gather
    return gathered


def test_backward_does_not_gather_the_embedding(ranks, tmp_path):
    for gathered in ranks.run(count_gathered, make_checkpoint(tmp_path, "llama")):
        assert len(gathered) == 2 and not any("embed_tokens" in name for name in gathered), gathered


# ---- Storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_storage_is_the_parameter_dtype_or_no_number_at_all(storage, param_dtype):
    if storage in (torch.uint8, param_dtype):
        check_storage_dtype(storage, param_dtype)
    else:
        with pytest.raises(ValueError, match=r"cast the packed 4-bit bytes as numbers and train on garbage\. Leave"):
            check_storage_dtype(storage, param_dtype)


def gather_in_another_dtype(rank: int, folder: str, storage: torch.dtype, param_dtype: torch.dtype) -> float:
    """Do what is refused: store in one dtype, gather in another. Return how far the weight is off, in its spread."""
    policy = ShardingPolicy(param_dtype=param_dtype)
    linear = next(m for m in whole_model(folder, param_dtype).modules() if hasattr(m, "quant_state"))
    from hf_qlora_fsdp.packed_linear import repack

    layer = repack(linear, compute_dtype=param_dtype, storage_dtype=storage)
    right = layer.dequantize().float()
    policy.fully_shard(layer, make_mesh(), set())
    layer.unshard()
    gathered = layer.weight.detach()
    if gathered.nbytes != layer.layout.num_bytes:
        return float("inf")
    return ((dequantize(gathered, layer.layout, param_dtype).float() - right).abs().max() / right.abs().max()).item()


def test_refused_pairs_are_really_wrong(ranks, tmp_path):
    folder = make_checkpoint(tmp_path)
    for storage, param_dtype, wrong in [
        (torch.bfloat16, torch.float16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
    ]:
        for error in ranks.run(gather_in_another_dtype, folder, storage, param_dtype):
            assert (not error < 0.5) if wrong else error == 0, (storage, param_dtype, error)


# ---- Proof that it was done ------------------------------------------------------------------------------------------


def check_what_is_not_sharded(rank: int, folder: str) -> list[str]:
    """Return what `check_sharded` says of models of which a part was left whole."""
    policy, mesh = ShardingPolicy(), make_mesh()
    said = []

    def check(model: nn.Module, policy: ShardingPolicy = policy) -> None:
        try:
            check_sharded(model, policy)
            said.append("fine")
        except ShardingError as error:
            said.append(str(error))

    def fresh() -> PreTrainedModel:
        return whole_model(folder, torch.bfloat16, torch.bfloat16)

    check(fresh())
    model = fresh()
    for layer in model.model.layers[:1]:
        policy.fully_shard(layer, mesh, set())
    policy.fully_shard(model, mesh, set())
    check(model)
    model = shard_model(fresh(), policy)
    check(model)
    model.model.norm.extra = nn.Parameter(torch.ones(4), requires_grad=False)
    check(model)
    model = shard_model(fresh(), policy)
    check(inject_adapter(model, LoraConfig(**LORA)))
    return said


def test_what_is_left_whole_is_found(ranks, tmp_path):
    for said in ranks.run(check_what_is_not_sharded, make_checkpoint(tmp_path)):
        assert said[0].startswith(
            "These modules should be FSDP units and are not: ['model.layers.0', 'model.layers.1']"
        )
        assert said[1].startswith("These modules should be FSDP units and are not: ['model.layers.1']")
        assert said[2] == "fine"
        assert "model.norm.extra (16 B) is whole on every rank" in said[3]
        assert said[4].startswith("These modules should be FSDP units and are not: ['PeftModelForCausalLM']")


def describe_shards(rank: int, folder: str) -> dict[str, Any]:
    policy = ShardingPolicy()
    model = load_quantized_model(folder, peft_config=LoraConfig(**LORA), policy=policy, progress=False)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    local = sum(parameter.to_local().nbytes for parameter in model.parameters())
    packed = [module.weight for module in model.modules() if isinstance(module, PackedLinear4bit)]
    labels = {(weight.quant_type, weight.compress_statistics) for weight in packed}
    return {"is_sharded": is_sharded(model), "part": local / whole, "labels": labels, "num_packed": len(packed)}


def test_each_rank_holds_its_part_scales_included(ranks, tmp_path):
    for described in ranks.run(describe_shards, make_checkpoint(tmp_path)):
        assert described["is_sharded"] and described["part"] == pytest.approx(1 / 2, abs=1e-3)
        assert described["labels"] == {("nf4", True)} and described["num_packed"] == 14


def count_weights_held(rank: int, folder: str) -> list[int]:
    held: list[int] = []
    weights: list[weakref.ref[Any]] = []

    def counting(linear: Any, **options: Any) -> Any:
        weights.append(weakref.ref(linear.weight))
        held.append(sum(weight() is not None for weight in weights))
        return repack(linear, **options)

    model = whole_model(folder, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "repack", counting)
        shard_model(model, ShardingPolicy())
    return held


def test_a_model_in_memory_is_not_held_twice(ranks, tmp_path):
    """Of the weights as bitsandbytes made them, only the one that is repacked has been there beside its copy."""
    for held in ranks.run(count_weights_held, make_checkpoint(tmp_path)):
        assert held == [1] * 14


def shard_what_is_not_quantised(rank: int, folder: str) -> str:
    try:
        shard_model(AutoModelForCausalLM.from_pretrained(folder), ShardingPolicy())
    except ValueError as error:
        return str(error)
    return ""


def test_models_in_16_bits_are_refused(ranks, tmp_path):
    for message in ranks.run(shard_what_is_not_quantised, make_checkpoint(tmp_path)):
        assert message.startswith("The LlamaForCausalLM passed as model is not quantised") and "load_in_4bit" in message


# ---- Memory ----------------------------------------------------------------------------------------------------------


class CountedAllGather(DefaultAllGather):
    """Counts the buffers that are there at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = self.total = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        deadline = time.monotonic() + 2
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.001)  # gloo's thread lets go of the buffers in its own time
        buffer = super().allocate(size, dtype=dtype, device=device)
        self.alive += 1
        self.total += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(buffer, self._forget)
        return buffer

    def _forget(self) -> None:
        self.alive -= 1


def count_buffers(rank: int, folder: str, offload: bool) -> tuple[int, int, int]:
    model = load_quantized_model(
        folder, peft_config=LoraConfig(**LORA), policy=ShardingPolicy(cpu_offload=offload), progress=False
    )
    checkpoint_activations(model)
    counted = CountedAllGather()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(counted)
    step(model.train(), INPUT_IDS[rank : rank + 1])
    return counted.total, counted.most, counted.alive


@pytest.mark.parametrize("offload", [False, True])
def test_one_unit_at_a_time_lies_in_a_buffer(ranks, tmp_path, offload):
    """FSDP alone keeps that of the unit which computes until the next one has been gathered into another."""
    folder = make_checkpoint(tmp_path, num_hidden_layers=3)
    for total, most, alive in ranks.run(count_buffers, folder, offload):
        assert total >= 3 + 3 + 2  # layers twice, embedding, and norm and head
        assert most == 1 and alive <= 1  # of the last one gloo may not have let go

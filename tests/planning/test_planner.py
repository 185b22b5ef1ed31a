"""The planner: what it adds up is what there is, and what it advises holds.

What follows from shapes alone (shards, adapter, gradients, optimizer, what a layer saves) is held against real tiny
models, byte for byte. What only cards can show is held against the rows of `benchmarks/results.csv` that real cards
wrote (`test_what_is_planned_is_what_was_measured` in tests/test_readme.py).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from hf_qlora_fsdp import cli, packing
from hf_qlora_fsdp.experts.layers import Experts4bit
from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.packed_linear import PackedLinear4bit
from hf_qlora_fsdp.planning.auto import apply_plan
from hf_qlora_fsdp.planning.cards import CARDS, find_card, find_link
from hf_qlora_fsdp.planning.files import training_fields
from hf_qlora_fsdp.planning.layer_trial import (
    ALLOCATION_BYTES,
    _catch_arguments,
    _Meter,
    _ready_to_run,
    try_layer,
    try_norm,
)
from hf_qlora_fsdp.planning.memory_estimate import estimate
from hf_qlora_fsdp.planning.memory_model import find_peaks, resident
from hf_qlora_fsdp.planning.model_config import read_config
from hf_qlora_fsdp.planning.planner import estimate_memory, find_batches, plan
from hf_qlora_fsdp.planning.settings import Settings, check_settings
from hf_qlora_fsdp.planning.time_model import EFFICIENCY, STEP_SECONDS, bound_time
from hf_qlora_fsdp.planning.weighing import ModelWeight, weigh_model
from hf_qlora_fsdp.sharding_policy import ShardingPolicy
from hf_qlora_fsdp.speed.checkpointing import count_saved_bytes
from tests.distributed import RankPool
from tests.tiny import VOCAB_SIZE, make_checkpoint, tiny_dataset
from tests.training import alone, ours

ROOT = Path(__file__).parents[2]
GIB = 2**30
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": VOCAB_SIZE}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
LLAMA_70B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672}
LLAMA_70B |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA_8B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


def config_of(values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights() -> dict[str, ModelWeight]:
    """The large models, weighed once."""
    return {name: weigh_model(config_of(values)) for name, values in {"70b": LLAMA_70B, "8b": LLAMA_8B}.items()}


# ---- What follows from shapes is exact -------------------------------------------------------------------------------


def train_and_weigh(rank: int, file: str, lora_r: int, offload: bool, replicate: int | None) -> dict[str, int]:
    """Load a model of random weights, take a step, and weigh what this rank holds."""
    policy = ShardingPolicy(cpu_offload=offload, cpu_offload_layers=2 if offload else None, replicate_layers=replicate)
    lora = LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = load_quantized_model(file, random_weights=True, peft_config=lora, policy=policy, progress=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(24).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    sizes: Counter[str] = Counter()
    offloaded: Counter[str] = Counter()
    packed = {}
    for module in model.modules():
        if isinstance(module, PackedLinear4bit):
            packed[module.weight] = module.layout.codes_bytes / module.layout.num_bytes
        elif isinstance(module, Experts4bit):
            for name, stack in module.layouts.items():
                packed[getattr(module, name)] = stack.num_pieces * stack.piece.codes_bytes / stack.num_bytes
    for parameter in model.parameters():
        local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        kind = "LoRA" if parameter.requires_grad else "packed" if parameter in packed else "plain"
        (offloaded if type(local).__name__ == "HostTensor" else sizes)[kind] += local.nbytes
        if parameter.grad is not None:
            sizes["gradients"] += parameter.grad.to_local().nbytes
    moments = (state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    sizes["optimizer"] = sum(moment.to_local().nbytes for moment in moments)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
    layer.unshard()
    sizes["gathered"] = sum(parameter.untyped_storage().nbytes() for parameter in layer.parameters())
    return dict(sizes) | {f"offloaded {kind}": size for kind, size in offloaded.items()}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "tied", "lora_r", "offload", "replicate"),
    [
        ("llama", False, 5, True, None),
        ("qwen3", False, 8, False, None),
        ("qwen3", True, 8, False, None),
        ("mixtral", False, 4, False, None),
        ("llama", False, 5, False, 2),
    ],
    ids=["offloaded", "dense", "tied", "experts", "replicated"],
)
def test_shards_adapter_gradients_and_optimizer_are_exact(
    family, tied, lora_r, offload, replicate, num_ranks, tmp_path, ranks: RankPool
):
    """The share of a rank, of weights whose rows do not divide evenly (r=5)."""
    values = SIZES | TINY[family] | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(values))
    pool = ranks if num_ranks == 2 else alone()
    real = pool.run(train_and_weigh, str(tmp_path / "config.json"), lora_r, offload, replicate)[0]
    weight = weigh_model(str(tmp_path), lora_r=lora_r)
    layers = 2 if offload else None
    settings = Settings(num_ranks=num_ranks, ranks_per_host=num_ranks, cpu_offload=offload, cpu_offload_layers=layers)
    settings = replace(settings, replicate_layers=replicate)
    held = resident(weight, settings)
    assert held["4-bit codes"] + held["scales"] == real["packed"]
    assert held["embedding, head and norms"] == real["plain"]
    assert held["LoRA"] == real["LoRA"]
    assert held["optimizer"] == real["optimizer"]
    assert find_peaks(weight, settings)["steady"].sizes["LoRA"] == real["LoRA"]
    assert sum(4 * unit.parts.trained_numel(num_ranks) // num_ranks for unit in weight.units) == real["gradients"]
    assert weight.layers[1].parts.gathered(num_ranks) == real["gathered"]
    if offload:
        away = [unit for unit in weight.layers if unit.unit.name in settings.offloaded(weight)]
        assert sum(unit.parts.frozen_matrices.shards(num_ranks).total() for unit in away) == real["offloaded packed"]


def test_replicated_layers_take_their_weights_and_gather_their_adapters(weights):
    weight, settings = weights["8b"], Settings(num_ranks=2, ranks_per_host=2, batch=8)
    whole = replace(settings, replicate_layers="all")
    cut, peak = find_peaks(weight, settings), find_peaks(weight, whole)
    layers = [unit.parts for unit in weight.layers]
    frozen = sum(parts.final_bytes for parts in layers)
    adapters = sum(parts.trained_numel(2) * 2 for parts in layers)
    assert "backward" in peak["steady"].name and peak["steady"].sizes["gathered units"] == adapters
    assert peak["steady"].total - cut["steady"].total == pytest.approx(
        frozen / 2 - 2 * frozen / 32 + adapters, rel=0.03
    )
    # The last layer to be loaded is whole and stays, and of its adapter a part is copied.
    assert peak["load"].total < cut["load"].total + frozen / 2
    few = replace(whole, replicate_layers=8)
    assert cut["steady"].total < find_peaks(weight, few)["steady"].total < peak["steady"].total
    assert "8 of 32 layers whole on every card" in few.describe(32)
    assert "replicate_layers" in training_fields(few) and "replicate_layers" not in training_fields(settings)


@pytest.mark.parametrize("given", ["8", "most", 0, 33, True])
def test_replicated_layers_that_cannot_be_are_refused(weights, given):
    with pytest.raises(ValueError, match="replicate_layers"):
        check_settings(Settings(replicate_layers=given), 32)
    with pytest.raises(ValueError, match=r"replicate_layers='all' with cpu_offload=True: .* Leave one"):
        check_settings(Settings(replicate_layers="all", cpu_offload=True), 32)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("fuse", [True, False])
def test_what_a_layer_keeps_is_what_autograd_saves(family, fuse):
    """The layer is run for real on the CPU, with weights that are whatever was in memory: sizes do not care."""
    values = SIZES | TINY[family] | {"num_key_value_heads": 4}  # which CPUs have flash attention for
    weight = weigh_model(config_of(values), lora_r=8)
    kind = weight.layers[0].kind
    planned = try_layer(weight, kind, batch=2, seq=64, gradient_checkpointing=False, fuse=fuse).kept
    real = weigh_model(config_of(values), lora_r=8)
    with _ready_to_run(real, False, fuse):
        layer = real.base.get_submodule(kind)
        named = _catch_arguments(real.base, layer, 2, 64)
        named["position_embeddings"] = tuple(torch.ones(1, 64, 32, dtype=torch.bfloat16) for _ in range(2))
        named["position_ids"] = torch.arange(64)[None]
        layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8).zero_()
        x = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
        with count_saved_bytes(layer) as storages:
            y = layer(x, **named)
        y = y[0] if isinstance(y, tuple) else y
    assert y.shape == x.shape
    saved = sum(-(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES for size in storages.values())
    # The order of rows and its inverse, two a token, which functions of experts keep without autograd's knowing.
    orders = 2 * torch.int64.itemsize * (2 * 2 * 64) if family == "mixtral" else 0
    # A fused norm keeps the layer's input, which is not among what a layer saves: computed twice, it is kept as well.
    # And a fused MLP keeps, beside what is saved, what A of down puts out.
    inside = 2 * 64 * 8 * 2 if fuse and family == "llama" else 0
    assert planned == saved + orders + (x.untyped_storage().nbytes() if fuse else 0) + inside


@pytest.mark.parametrize(
    ("shape", "fuse", "forward", "backward"),
    [
        ("70b", False, (14336, 8192), (14336, 8192)),
        ("8b", False, (14336, 4096), (14336, 4096)),
        # Gate and up are one product, with room for two adapters of rank 16; down comes after it, in halves, while what
        # they put out is there. The backward begins with that, and before it gate and up are computed again.
        ("70b", True, (8192, 14336), (8192, 14336)),
        ("8b", True, (2 * 14336, 4096 + 32), (2 * 14336, 4096 + 32)),
    ],
)
def test_of_large_weights_a_piece_is_there_in_16_bits(weights, shape, fuse, forward, backward, monkeypatch):
    """Half of [28672, 8192], of the MLP, all of [14336, 4096]. Scales are no part of it, nor of what is computed."""
    weight = weights[shape]
    trial = try_layer(weight, weight.layers[0].kind, batch=1, seq=2048, fuse=fuse)
    assert trial.forward["dequantised weights"] == 2 * math.prod(forward)
    assert trial.backward["dequantised weights"] == 2 * math.prod(backward)
    monkeypatch.setattr(packing, "PIECE_BYTES", 1 << 40)
    whole = try_layer(replace(weight, trials={}), weight.layers[0].kind, batch=1, seq=2048, fuse=fuse)
    for pieces, at_once in ((trial.forward, whole.forward), (trial.backward, whole.backward)):
        assert sum(pieces.values()) <= sum(at_once.values())
        assert fuse or pieces["activations"] == at_once["activations"]  # one moment is the peak of both


def test_a_weight_whose_rows_are_no_whole_blocks_is_there_twice_while_it_is_joined_with_another():
    """It cannot be written into wider rows by the kernel that makes it."""
    weight = weigh_model(config_of(LLAMA_8B | {"hidden_size": 4096 + 32, "head_dim": 128}))
    trial = try_layer(weight, weight.layers[0].kind, batch=1, seq=2048)
    joined, alone = 2 * 14336 * (4096 + 32 + 32), 14336 * (4096 + 32)
    assert trial.forward["dequantised weights"] == 2 * (joined + alone)


UNUSUAL: dict[str, dict[str, Any]] = {
    # Its router adds a buffer to what it computes.
    "deepseek": {"model_type": "deepseek_v3", "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 1}
    | {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 64},
    # Its rotary frequencies depend on how long the sequence is.
    "longrope": {"model_type": "phi3", "pad_token_id": 0, "max_position_embeddings": 4096}
    | {"original_max_position_embeddings": 64}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.1] * 16}},
}


@pytest.mark.parametrize("values", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_layers_run_that_do_something_unusual(values):
    weight = weigh_model(config_of(SIZES | values))
    before = {name: buffer.device.type for name, buffer in weight.short.named_buffers()}
    assert all(try_layer(weight, layer.kind, batch=1, seq=128).backward for layer in weight.layers)
    assert {name: buffer.device.type for name, buffer in weight.short.named_buffers()} == before


# ---- More takes more -------------------------------------------------------------------------------------------------

START = Settings(num_ranks=2, ranks_per_host=2, seq=1024, batch=2)
STAGED = {"cpu_offload": True, "activation_offloading": True, "batch": 16}  # takes more of the host than loading does


@pytest.mark.parametrize(
    ("changes", "place", "sign"),
    [
        ([{"seq": 512}, {"seq": 1024}, {"seq": 4096}], "card", +1),
        ([{"batch": 1}, {"batch": 2}, {"batch": 8}], "card", +1),
        ([{"num_ranks": ranks, "ranks_per_host": ranks} for ranks in (2, 3, 4, 8)], "card", -1),
        ([{"num_ranks": ranks, "ranks_per_host": ranks} for ranks in (2, 4, 8)], "host", +1),
        ([{"checkpoint_layers": count} for count in (0, 10, 31, None)], "card", -1),
        ([{"cpu_offload": True, "cpu_offload_layers": count} for count in (1, 8, 32)], "card", -1),
        ([{"cpu_offload": True, "cpu_offload_layers": count} for count in (1, 8, 32, None)], "host", +1),
        ([{"activation_offloading": False}, {"activation_offloading": True}], "card", -1),
        ([STAGED | {"cpu_offload_pin_memory": True}, STAGED | {"cpu_offload_pin_memory": False}], "host", +1),
        (
            [{"use_liger_kernel": liger, "fuse_lora": False, "batch": 16} for liger in (False, True)],
            "card",
            -1,
        ),
        ([{"fuse_lora": True}, {"fuse_lora": False, "batch": 8}], "card", +1),
    ],
)
def test_more_takes_more(changes, place, sign, weights):
    taken = [estimate(weights["8b"], replace(START, **change)) for change in changes]
    sizes = [one.card_bytes if place == "card" else one.host_bytes for one in taken]
    assert all(sign * (after - before) > 0 for before, after in itertools.pairwise(sizes)), sizes


def test_a_fused_norm_takes_what_its_kernels_write():
    """Each way one matrix, and in the forward one number a row; torch's operations would take several in float32."""
    weight = weigh_model(config_of(SIZES | TINY["llama"]), lora_r=8)
    norm = weight.base.model.norm
    x = torch.empty(1, 128, 128, dtype=torch.bfloat16, device="meta").requires_grad_()
    with _ready_to_run(weight, False, True), _Meter(iter([x, norm.weight])) as meter:
        y = norm(x)
        assert meter.most == y.nbytes + 4 * 128
        dy = torch.empty_like(y)
        meter.begin()
        torch.autograd.grad(y, x, dy)
        assert meter.most == y.nbytes + 4 * 128 + dy.nbytes + x.nbytes


@pytest.mark.parametrize(("trained", "is_liger"), [("model.norm", False), ("norm", True)])
def test_ligers_norms_are_off_where_some_are_fused(trained, is_liger):
    """As the trainer has it: what is trained, and so not fused, is then transformers', which takes far more."""
    lora = LoraConfig(target_modules="all-linear", modules_to_save=[trained], task_type="CAUSAL_LM")
    weight = weigh_model(config_of(SIZES | TINY["llama"]), peft_config=lora)
    liger, theirs = (try_norm(weight, Settings(seq=64, use_liger_kernel=used)) for used in (True, False))
    assert (liger.forward < theirs.forward) == is_liger
    assert is_liger or liger == theirs


def test_a_plan_leaves_it_to_the_trainer_what_of_liger_is_left_out():
    """Which sees what is fused: nothing of Gemma's norms, say, so that Liger's are to be used."""
    assert "liger_kernel_config" not in training_fields(Settings(use_liger_kernel=True))


def test_higher_ranks_and_more_targets_take_more():
    def card_bytes(**adapter: Any) -> int:
        return estimate_memory(config_of(SIZES | TINY["llama"]), num_gpus=2, seq=64, **adapter).card_bytes

    attention = ["q_proj", "v_proj"]
    assert card_bytes(lora_r=8, target_modules=attention) < card_bytes(lora_r=8) < card_bytes(lora_r=64)


# ---- What others have published --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published_bytes", "num_gpus", "adapter", "settings"),
    [
        # Answer.AI, 70B on two cards of 24 GB, weights offloaded, r=64 (fsdp_qlora, benchmarks_03_2024.md)
        (14.92 * GIB, 2, {"lora_r": 64}, {"seq": 2048, "batch": 2, "cpu_offload": True}),
        # The same by the HF stack, r=8 (peft docs, accelerate/fsdp.md), offloaded and not
        (19.6e9, 2, {"lora_r": 8}, {"seq": 2048, "batch": 2, "cpu_offload": True}),
        (35.6e9, 2, {"lora_r": 8}, {"seq": 2048, "batch": 2}),
        # fms-acceleration on two A100, attention only, r=16 (scripts/benchmarks/refs/a100_80gb.csv)
        (
            46.4e9,
            2,
            {"lora_r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            {"seq": 4096, "batch": 2},
        ),
    ],
)
def test_no_published_run_is_claimed_to_take_more(published_bytes, num_gpus, adapter, settings):
    """Other software replicates scales and makes all logits, so this one takes less, but not wonders less."""
    taken = estimate_memory(config_of(LLAMA_70B), num_gpus=num_gpus, **adapter, **settings).allocated_bytes
    assert 0.4 * published_bytes < taken <= published_bytes


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"device_memory": "24"}, "device_memory='24': '24' is not a size"),
        ({"device_memory": -1}, "device_memory=-1"),
        ({"device_memory": "24GiB", "host_memory": "much"}, "host_memory='much'"),
        ({"device_memory": "24GiB", "swap": -1}, "swap=-1"),
        ({}, "device_memory, '24GiB' say"),
    ],
)
def test_sizes_that_are_none(sizes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(config_of(SIZES | TINY["llama"]), num_gpus=2, **sizes)


# ---- The search ------------------------------------------------------------------------------------------------------


def test_what_is_said_to_be_as_fast_takes_no_less_of_the_host():
    """Equally fast is held against the fastest of all, which is seldom the one that is chosen."""
    found = plan(config_of(LLAMA_70B), num_gpus=2, card="3090", host_memory=128 * GIB)
    best = max(one.time.tokens_per_second for one in [found.chosen, *found.rejected] if not one.obstacles)
    assert best > found.chosen.time.tokens_per_second
    as_fast = [one for one in found.rejected if "as fast" in one.reason]
    assert as_fast
    for one in as_fast:
        assert one.time.tokens_per_second >= 0.99 * best
        assert one.estimate.host_bytes >= found.chosen.estimate.host_bytes


def test_the_fastest_that_fits_is_chosen():
    found = plan(config_of(LLAMA_70B), num_gpus=2, card="4090", host_memory="64GiB")
    chosen = found.chosen
    assert found.fits and 0 <= found.margin_bytes < found.machine.device_bytes
    assert chosen.estimate.card_bytes <= found.machine.device_bytes
    assert chosen.estimate.host_bytes <= 64 * GIB
    fitting = [one for one in found.rejected if not one.obstacles]
    assert fitting
    assert all(one.time.tokens_per_second <= chosen.time.tokens_per_second / 0.99 for one in fitting)
    assert all(one.reason for one in found.rejected)
    for one in found.rejected:
        too_large = one.estimate.card_bytes > found.machine.device_bytes or one.estimate.host_bytes > 64 * GIB
        assert too_large == bool(one.obstacles) and one.reason.startswith("fits") != too_large
    # As few layers go to the host as will do: with one less it does not fit.
    layers = [one for one in [chosen, *fitting] if (one.settings.cpu_offload_layers or 1) > 1]
    assert layers
    for one in layers:
        fewer = replace(one.settings, cpu_offload_layers=one.settings.cpu_offload_layers - 1)
        assert estimate(found.weight, fewer, 8).card_bytes > found.machine.device_bytes


def test_a_large_card_computes_nothing_twice():
    found = plan(config_of(LLAMA_8B), num_gpus=2, card="H200", target_batch=4)
    assert found.chosen.settings.recomputed(32) == 0
    assert not found.chosen.settings.cpu_offload and not found.chosen.settings.activation_offloading


def test_what_is_fixed_stays():
    fixed = {"cpu_offload": True, "cpu_offload_layers": 5, "activation_offloading": False}
    found = plan(config_of(LLAMA_8B), num_gpus=2, card="4090", batch=2, target_batch=8, fixed=fixed)
    for one in [found.chosen, *found.rejected]:
        assert {name: getattr(one.settings, name) for name in fixed} == fixed
        assert (one.settings.batch, one.settings.gradient_accumulation_steps) == (2, 2)


@pytest.mark.parametrize(
    ("machine", "helps"),
    [
        (
            {"num_gpus": 2, "device_memory": 8 * GIB, "host_memory": 32 * GIB},
            {"device_memory", "host_memory", "num_gpus"},
        ),
        ({"num_gpus": 1, "device_memory": 6 * GIB, "host_memory": 512 * GIB, "seq": 8192}, {"device_memory", "seq"}),
    ],
)
def test_the_least_change_that_would_help_helps(machine, helps):
    given = {"target_batch": machine["num_gpus"], "card": "4090"} | machine
    found = plan(config_of(LLAMA_70B), **given)
    assert not found.fits and found.chosen.obstacles
    assert helps <= {change.option for change in found.changes}
    assert [change.factor for change in found.changes] == sorted(change.factor for change in found.changes)
    for change in found.changes:
        changed = given | {change.option: change.value}
        if change.option == "num_gpus":
            changed |= {"target_batch": change.value, "gpus_per_host": min(change.value, 8)}
        assert plan(config_of(LLAMA_70B), **changed).fits, change
    larger = next(change for change in found.changes if change.option == "device_memory")
    assert not plan(config_of(LLAMA_70B), **(given | {"device_memory": int(0.95 * larger.value)})).fits


def test_swap_serves_what_is_not_pinned():
    given: dict[str, Any] = {"num_gpus": 2, "device_memory": 8 * GIB, "host_memory": 24 * GIB, "target_batch": 2}
    found = plan(config_of(LLAMA_70B), **given, swap="64GiB")
    assert found.machine.swap_bytes == 64 * GIB
    assert found.fits and found.chosen.settings.cpu_offload and not found.chosen.settings.cpu_offload_pin_memory


def test_the_last_product_of_a_fused_mlp_is_not_counted_twice(weights):
    """As a rehearsal counts what it has run (`speed/matmul_share.py`)."""
    card, link = find_card("H100"), 1e11
    fused, apart = (
        bound_time(weights["70b"], Settings(num_ranks=2, fuse_lora=flag), card, link, link) for flag in (1, 0)
    )
    down, adapter = 8192 * 28672, 16 * (8192 + 28672)
    spared = 80 * 2 * (down + adapter) * 2048
    assert (apart.compute - fused.compute) * EFFICIENCY * card.flops == pytest.approx(spared)
    assert (apart.dequantise - fused.dequantise) * card.memory_rate == pytest.approx(80 * down * 2.5)


def test_on_one_rank_a_layer_waits_for_its_weights(weights):
    card, link = find_card("H100"), 2e10
    settings = Settings(num_ranks=1, batch=8, cpu_offload=True, activation_offloading=True)
    alone = bound_time(weights["8b"], settings, card, link, link)
    two = bound_time(weights["8b"], replace(settings, num_ranks=2), card, link, link)
    assert alone.host_waits > 0 and two.host_waits == 0
    assert alone.seconds - STEP_SECONDS == pytest.approx(alone.host_waits + alone.compute + alone.dequantise)
    assert two.seconds - STEP_SECONDS == pytest.approx(max(two.compute + two.dequantise, two.host, two.gather))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"param_dtype": "bf16"}, "Write one of bfloat16, float16, float32"),
        ({"sequence": 5}, "sequence: there is no such setting to plan with. Known: activation_offloading"),
        ({"batch_": 5}, "Did you mean 'batch'"),
        ({"num_ranks": 2}, "num_ranks: there is no such setting"),
        ({"gpus_per_host": 0}, "gpus_per_host=0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        estimate_memory(config_of(SIZES | TINY["llama"]), **arguments)


@pytest.mark.parametrize(
    ("num_gpus", "batch", "target", "batches"),
    [
        (2, None, 12, [(1, 6), (2, 3), (3, 2), (6, 1)]),
        (2, 3, 12, [(3, 2)]),
        (2, 4, None, [(4, 1)]),
        (1, None, 60, [(1, 60), (2, 30), (3, 20), (5, 12), (10, 6), (15, 4), (30, 2), (60, 1)]),
        (32, None, None, [(1, 1)]),
    ],
)
def test_batches_divide_a_step(num_gpus, batch, target, batches):
    assert find_batches(num_gpus, batch, target) == batches


def test_cards_and_links_are_found_by_any_name():
    for name, known in {
        "RTX 4090": "4090",
        "NVIDIA H100 80GB HBM3": "H100",
        "rtx-a6000": "A6000",
        "a10g": "A10G",
    }.items():
        assert find_card(name) is CARDS[known]
    assert find_link("PCIe4x16") == find_link("25.2GB")


# ---- A run that plans itself -----------------------------------------------------------------------------------------


def plan_itself(rank: int, folder: str, out: str, changes: dict[str, Any], device_bytes: int | None = None) -> Any:
    """Make a trainer, on a machine with so much memory for each rank, and take a step with it."""
    from hf_qlora_fsdp.planning import auto as auto_planning

    find_memory = auto_planning.find_memory
    if device_bytes is not None:
        auto_planning.find_memory = lambda on_gpu: (device_bytes, None)
    try:
        options = {
            "folder": out,
            "auto_plan": True,
            "max_length": 32,
            "max_steps": 1,
            "gradient_checkpointing": True,
        } | changes
        trainer = ours(folder, tiny_dataset(32), options)
    except ValueError as error:
        return str(error)
    finally:
        auto_planning.find_memory = find_memory
    result = trainer.train()
    args = trainer.args
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "checkpoint_layers", "cpu_offload")
    return {name: getattr(args, name) for name in names} | {"steps": result.global_step}


def test_a_run_plans_itself_and_leaves_what_was_said(folder, tmp_path, ranks: RankPool):
    """Eight sequences a rank and a step, however they are divided; a batch that was chosen stays."""
    free = ranks.run(
        plan_itself, folder, str(tmp_path), {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    )
    assert free[0] == free[1]
    assert free[0]["per_device_train_batch_size"] * free[0]["gradient_accumulation_steps"] == 8
    assert (free[0]["checkpoint_layers"], free[0]["cpu_offload"], free[0]["steps"]) == (0, False, 1)
    said = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "checkpoint_layers": 1}
    assert ranks.run(plan_itself, folder, str(tmp_path), said)[0] == said | {"cpu_offload": False, "steps": 1}


def test_a_run_that_cannot_fit_is_refused_before_it_loads(folder, tmp_path, ranks: RankPool):
    for said in ranks.run(plan_itself, folder, str(tmp_path), {"per_device_train_batch_size": 8}, 100 << 20):
        assert "auto_plan=True found no settings" in said and "What would help: cards of" in said


# ---- The command -----------------------------------------------------------------------------------------------------


MACHINE = ["--gpus", "2", "--card", "4090"]


def test_everything_that_fits_is_written(folder, tmp_path, capsys):
    files = {name: str(tmp_path / name) for name in ("plan.json", "plan.png", "script.py", "config.yaml")}
    words = ["plan", folder, *MACHINE, "--seq", "64", "--host-memory", "8GiB"]
    assert (
        cli.main([*words, "--json", files["plan.json"], "--plot", files["plan.png"], "--emit", files["script.py"]]) == 0
    )
    said = capsys.readouterr().out
    figures = json.loads(Path(files["plan.json"]).read_text())
    assert figures["fits"] and "It fits" in said
    assert Path(files["plan.png"]).read_bytes().startswith(b"\x89PNG")
    steady = figures["chosen"]["card"]["steady"]
    assert sum(steady["causes"].values()) == steady["bytes"]
    assert all(cause in said for cause in steady["causes"])
    compile(Path(files["script.py"]).read_text(), "script.py", "exec")
    assert cli.main([*words, "--emit", files["config.yaml"], "--dataset", "data.jsonl"]) == 0
    written = yaml.safe_load(Path(files["config.yaml"]).read_text())
    settings = figures["chosen"]["settings"]
    assert written["per_device_train_batch_size"] == settings["batch"]
    assert (written["max_length"], written["dataset_name"], written["use_peft"]) == (64, "data.jsonl", True)


@pytest.mark.parametrize("model", [".", "config.json"])
def test_an_output_folder_has_a_name_wherever_the_model_is(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    file = tmp_path / "config.yaml"
    assert cli.main(["plan", model, *MACHINE, "--seq", "64", "--emit", str(file)]) == 0
    assert yaml.safe_load(file.read_text())["output_dir"] == f"{Path(folder).name}-SFT"


def test_what_does_not_fit_exits_with_1_and_writes_no_script(folder, tmp_path, capsys):
    script = tmp_path / "script.py"
    words = ["plan", folder, "--gpus", "2", "--device-memory", "100MiB", "--seq", "64"]
    assert cli.main([*words, "--emit", str(script)]) == 1
    assert "It does not fit" in capsys.readouterr().out
    assert not script.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*MACHINE, "--device-memory", "24"], "--device-memory '24' is not a size"),
        ([*MACHINE, "--host-memory=-1GiB"], "--host-memory '-1GiB' is not a size"),
        (["--gpus", "0", "--card", "4090"], "num_gpus=0"),
        (["--gpus", "2", "--card", "4091"], "'4091' is no card"),
        (["--gpus", "2"], "--card or --device-memory"),
        (["--card", "4090"], "--gpus"),
        ([*MACHINE, "--seq", "1"], "seq=1"),
        ([*MACHINE, "--batch", "0"], "batch=0"),
        ([*MACHINE, "--batch", "3", "--target-batch", "16"], "A step of 16 sequences cannot be divided"),
        ([*MACHINE, "--lora-r", "0"], "lora_r=0"),
        ([*MACHINE, "--target-modules", "nothing_like_it"], "nothing_like_it"),
        ([*MACHINE, "--target-modules", "lm_head"], "lm_head among its target_modules"),
        ([*MACHINE, "--link", "string"], "'string' is no link"),
        ([*MACHINE, "--gpus-per-host", "0"], "gpus_per_host=0"),
        ([*MACHINE, "--emit", "plan.txt"], "neither a script nor YAML"),
        ([*MACHINE, "--json", "no/such/folder.json"], "there is no folder for it"),
        ([*MACHINE, "--dataset", "x"], "--emit"),
    ],
)
def test_bad_options_are_refused_with_2(words, said, folder, capsys):
    if not torch.cuda.is_available() or "--gpus" in words:
        assert cli.main(["plan", folder, *words]) == 2
        assert said in capsys.readouterr().err


LISTED = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
LISTED |= {"layers_block_type": ["mamba", "moe"]}  # whose length their number is


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({}, "cannot be read"),
        ({"model_type": "llama", "hidden_size": None}, "cannot be read"),
        ({"model_type": "llama", "vocab_size": 512}, "does not say hidden_size, num_hidden_layers"),
        ({"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"model_type": "bert", **SIZES}, "BertLMHeadModel cannot be planned"),
        ({"model_type": "t5", **SIZES}, "T5Config is no causal language model"),
        ({"model_type": "llama", **SIZES, "hidden_size": "128"}, "expected int"),
        ({"model_type": "llama", **SIZES, "hidden_size": -128}, "hidden_size=-128"),
        ({"model_type": "llama", **SIZES, "num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"model_type": "llama", **SIZES, "vocab_size": 0}, "vocab_size=0"),
        ({"model_type": "nemotron_h", **LISTED}, "NemotronHExperts has no gate"),
        ({"model_type": "no_such", **SIZES, "auto_map": {"AutoConfig": "code.Config"}}, "give --trust-remote-code"),
        *(
            ({"model_type": "llama", **{key: value for key, value in SIZES.items() if key != name}}, f"not say {name}")
            for name in ("vocab_size", "intermediate_size", "num_attention_heads")
        ),
    ],
)
def test_bad_configs_are_refused_with_2(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert cli.main(["plan", str(tmp_path), *MACHINE]) == 2
    assert said in capsys.readouterr().err


def test_a_config_within_a_config_may_leave_out_its_defaults(tmp_path):
    """Gemma 3's own file says nothing of its vocabulary."""
    text = {"hidden_size": 128, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert read_config(str(tmp_path)).get_text_config().hidden_size == 128


def test_no_model_on_the_hub_is_refused_with_2(capsys):
    assert cli.main(["plan", "nobody/no-such-model", *MACHINE]) == 2
    assert "'nobody/no-such-model' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"reshard_after_forward": False}, {"cpu_offload_trainable": True}])
def test_auto_plan_refuses_what_is_not_in_its_figures(option):
    args = SimpleNamespace(
        **{"max_length": 128, "reshard_after_forward": True, "cpu_offload_trainable": False} | option
    )
    (name,) = option
    with pytest.raises(ValueError, match=rf"auto_plan=True with {name}={option[name]}: .* Leave one of the two out"):
        apply_plan(args, "a-model")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["script.py", "config.yaml"])
def test_what_is_emitted_runs(name, folder, tmp_path):
    tiny_dataset(16).to_json(tmp_path / "data.jsonl")
    words = ["plan", folder, "--gpus", "1", "--card", "4090", "--seq", "64", "--target-batch", "8"]
    words += ["--emit", str(tmp_path / name), "--dataset", str(tmp_path / "data.jsonl")]
    assert cli.main(words) == 0
    command = ["-m", "hf_qlora_fsdp.cli", "train", "--nproc", "1", "--config", name] if "yaml" in name else [name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, timeout=300)
    (adapter,) = tmp_path.glob("*-SFT/adapter_model.safetensors")
    assert adapter.stat().st_size > 0

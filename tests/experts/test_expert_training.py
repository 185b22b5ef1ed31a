"""A mixture of experts is trained as plain TRL trains it, with LoRA on its experts and its router kept in balance.

The reference is plain `SFTTrainer` in one process on upstream's model, whose experts hold the values of the packed
ones, under PEFT's own LoRA. Its two accumulated batches of one are those of our two ranks, which matters here: the
balance of a router is judged batch by batch. Bounds are those of test_trainer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_qlora_fsdp import merge_adapter
from hf_qlora_fsdp.checking import check_adapter
from hf_qlora_fsdp.experts.layers import PROJECTIONS, fused_experts, pack_experts
from tests import training
from tests.distributed import RankPool
from tests.test_trainer import assert_close
from tests.tiny import make_checkpoint

NUM_STEPS = 20
TARGETS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": [f"mlp.experts.{name}" for name in PROJECTIONS],
}
# Loud enough that a run without it is another one, as the test of its own shows.
ARGUMENTS: dict[str, Any] = {"max_steps": NUM_STEPS, "learning_rate": 1e-3, "router_aux_loss_coef": 0.1}


def train_ours(rank: int, folder: str, out: str, peft: dict[str, Any], changes: dict[str, Any]) -> training.Run:
    changes = ARGUMENTS | {"folder": out, "param_dtype": "float32"} | changes
    resume = changes.pop("resume_from_checkpoint", None)
    trainer = training.ours(folder, training.equal_rows(8), changes, peft)
    first = training.adapter_of(trainer.model)
    run = training.run(trainer, resume_from_checkpoint=resume)
    run.extra["first"] = first
    if changes.get("save_strategy") == "steps":
        trainer.save_model(out)
    return run


def train_stock(
    rank: int, folder: str, out: str, first: dict[str, Any], changes: dict[str, Any], peft: dict[str, Any] = TARGETS
) -> training.Run:
    model = dequantized_model(folder)
    changes = ARGUMENTS | {"folder": out, "gradient_accumulation_steps": 2} | changes
    trainer = training.stock(folder, training.equal_rows(8), changes, torch.float32, peft, model=model)
    training.fill_adapter(trainer.model, first)
    return training.run(trainer)


def dequantized_model(folder: str) -> Any:
    """A plain 4-bit model, whose experts bitsandbytes leaves alone, with the values that packed ones have."""
    model = training.plain_model(folder, torch.float32)
    for _, experts in fused_experts(model):
        weights = {name: getattr(experts, name) for name in PROJECTIONS}
        packed = pack_experts(experts, compute_dtype=torch.float32, storage_dtype=torch.float32)
        for name, weight in weights.items():
            weight.data = packed.dequantize(name)
            experts.register_parameter(name, weight)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral", dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def trained(ranks: RankPool, folder: str, out: str) -> training.Run:
    return ranks.run(train_ours, folder, out, TARGETS, {"save_strategy": "steps", "save_steps": 10})[0]


def test_trajectory_and_auxiliary_loss_equal_plain_trl(trained: training.Run, folder: str, out: str) -> None:
    assert trained.losses[-1] < trained.losses[0] - 0.5
    alone = training.alone()
    (stock,) = alone.run(train_stock, folder, out + "/stock", trained.extra["first"], {})
    assert_close(trained, stock, NUM_STEPS)
    (deaf,) = alone.run(
        train_stock, folder, out + "/deaf", trained.extra["first"], {"router_aux_loss_coef": 0.0, "max_steps": 1}
    )
    assert abs(deaf.losses[0] - trained.losses[0]) > 0.05


def test_a_router_is_trained_where_it_is_asked_for(ranks: RankPool, folder: str, tmp_path: Path) -> None:
    peft = TARGETS | {"modules_to_save": ["gate"]}
    ours = ranks.run(train_ours, folder, str(tmp_path / "ours"), peft, {"max_steps": 5})[0]
    first = ours.extra["first"]
    (stock,) = training.alone().run(train_stock, folder, str(tmp_path / "stock"), first, {"max_steps": 5}, peft)
    assert_close(ours, stock, 5)
    routers = [name for name in ours.adapter if ".gate." in name]
    assert len(routers) == 2 and not any(torch.equal(ours.adapter[name], first[name]) for name in routers)


def test_resumed_under_offload_and_checkpointing(
    trained: training.Run, ranks: RankPool, folder: str, out: str, tmp_path: Path
) -> None:
    changes = {
        "resume_from_checkpoint": f"{out}/checkpoint-10",
        "cpu_offload": True,
        "cpu_offload_pin_memory": False,
        "gradient_checkpointing": True,
    }
    resumed = ranks.run(train_ours, folder, str(tmp_path), TARGETS, changes)[0]
    for name, value in trained.adapter.items():
        assert torch.equal(resumed.adapter[name], value), name


def test_stock_peft_loads_what_was_trained(trained: training.Run, folder: str, out: str) -> None:
    model = PeftModel.from_pretrained(dequantized_model(folder), out)
    loaded = {name.replace(".default.", "."): value for name, value in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == trained.adapter.keys()
    for name, value in trained.adapter.items():
        assert torch.equal(loaded[name].float(), value), name


@torch.no_grad()
def test_merged_onto_what_was_trained_against(trained: training.Run, folder: str, out: str, tmp_path: Path) -> None:
    """The trained model, its experts in 4 bits, and the merged one, which has none, answer alike."""
    assert check_adapter(f"{out}/checkpoint-10").ok, check_adapter(f"{out}/checkpoint-10")
    output = merge_adapter(folder, out, tmp_path / "merged", base_weights="trained", progress=False)
    ids = torch.arange(5, 25)[None]
    # In evaluation, bitsandbytes multiplies in bfloat16 on some CPUs.
    expected = PeftModel.from_pretrained(dequantized_model(folder), out).train()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()(input_ids=ids).logits
    # Both round in float32, a few hundred products deep in each of two layers.
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    base = dequantized_model(folder).train()(input_ids=ids).logits
    assert (base - expected).abs().max() > 0.1 * expected.abs().max()

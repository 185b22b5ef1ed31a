"""DoRA on sharded 4-bit weights: magnitudes are those of the whole base, and gradients those of one process."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.sharding_policy import ShardingPolicy
from tests.test_sharding import LORA, assert_identical, compute_sharded, reference_model, row_by_row, whole_model
from tests.tiny import make_checkpoint


def load_magnitudes(rank: int, folder: str) -> dict[str, torch.Tensor]:
    policy = ShardingPolicy(param_dtype=torch.float32)
    config = LoraConfig(**LORA, use_dora=True)
    model = load_quantized_model(folder, peft_config=config, policy=policy, progress=False)
    named = dict(model.named_parameters())
    return {name: value.full_tensor().detach() for name, value in named.items() if "magnitude" in name}


def test_magnitudes_are_the_norms_of_the_base(ranks, tmp_path):
    folder = make_checkpoint(tmp_path, "llama")
    stock = get_peft_model(whole_model(folder, torch.float32), LoraConfig(**LORA, use_dora=True))
    expected = {name: value for name, value in stock.named_parameters() if "magnitude" in name}
    for found in ranks.run(load_magnitudes, folder):
        assert set(found) == set(expected) and len(found) == 14
        for name, magnitudes in expected.items():
            assert torch.equal(found[name], magnitudes), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_are_those_of_one_process(ranks, tmp_path, family):
    folder = make_checkpoint(tmp_path, family)
    expected = row_by_row(reference_model(folder, torch.bfloat16, use_dora=True))
    magnitudes = [name for name in expected[0]["gradients"] if "magnitude" in name]
    assert len(magnitudes) == 14 and all(expected[0]["gradients"][name].any() for name in magnitudes)
    variants = [
        {"dtype": torch.bfloat16, "use_dora": True, **way} for way in ({}, {"checkpointing": True}, {"offload": True})
    ]
    for rank, results in enumerate(ranks.run(compute_sharded, folder, variants)):
        for computed in results:
            assert_identical(computed, expected[rank])

"""A model of random weights is loaded as its checkpoint would be: same units, same sizes, same peak, nothing read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig

from tests import training
from tests.distributed import RankPool
from tests.test_loader import gathered, measure_loading
from tests.tiny import make_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def load_random(rank: int, config: str) -> dict[str, Any]:
    """Load random weights from nothing but a config, and return the model as every rank sees it."""
    from hf_qlora_fsdp.loader import load_quantized_model
    from hf_qlora_fsdp.packed_linear import PackedLinear4bit
    from hf_qlora_fsdp.packing import dequantize

    model = load_quantized_model(config, random_weights=True, progress=False)
    tensors = {name: gathered(parameter) for name, parameter in model.named_parameters()}
    dequantized = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear4bit):
            dequantized[name] = dequantize(tensors[f"{name}.weight"], module.layout, torch.bfloat16)
    return {"tensors": tensors, "dequantized": dequantized, "report": model.load_report}


@pytest.mark.parametrize("tie", [True, False])
def test_memory_and_bookkeeping_are_those_of_the_checkpoint(ranks: RankPool, tmp_path: Path, tie: bool) -> None:
    folder = make_checkpoint(tmp_path / "whole", "llama", tie=tie, **SIZES)
    (tmp_path / "config").mkdir()
    config = shutil.copy(f"{folder}/config.json", tmp_path / "config")
    options = {"peft_config": LoraConfig(**LORA)}
    read = ranks.run(measure_loading, folder, options)
    drawn = ranks.run(measure_loading, str(config), options | {"random_weights": True})
    for real, random in zip(read, drawn, strict=True):
        for term in ("S", "U", "T", "whole"):
            assert random[term] == real[term], term
        assert random["S"] <= random["peak"] <= random["S"] + 2 * random["U"] + random["T"]


def test_values(ranks: RankPool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", initializer_range=0.05, **SIZES)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    one, two = ranks.run(load_random, folder)
    assert one["report"].bytes_read == 0
    assert_same(one["tensors"], two["tensors"])
    for name, tensor in one["tensors"].items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.full_like(tensor, 0 if name.endswith("bias") else 1)), name
    assert len(one["dequantized"]) == 4 * 7
    assert_normal(one["tensors"]["model.embed_tokens.weight"], 0.05)
    reference = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(5)) * 0.05
    spread = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(reference, quant_type="nf4")).std().item()
    for weight in one["dequantized"].values():
        assert_normal(weight, spread)
    queries = [one["tensors"][f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*(query.view(torch.int16) for query in queries)), "two layers got the same weights"
    (alone,) = training.alone().run(load_random, folder)
    assert_same(alone["tensors"], one["tensors"])


def assert_same(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Compare bytes: packed ones may look like numbers that are not equal to themselves."""
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.int16), others[name].view(torch.int16)), name


def assert_normal(weight: torch.Tensor, spread: float) -> None:
    """The mean of n normal numbers strays by spread / sqrt(n), their spread by a 1 / sqrt(2 n) of it: five of these."""
    n = weight.numel()
    assert abs(weight.double().mean()) < 5 * spread / n**0.5
    assert abs(weight.double().std() / spread - 1) < 5 / (2 * n) ** 0.5

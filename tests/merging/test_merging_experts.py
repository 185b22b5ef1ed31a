"""A merged mixture of experts is base plus adapter, expert by expert, whatever form its checkpoint has.

The reference is stock PEFT, as in merging/test_merging.py: experts with LoRA of two different ranks, beside attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qlora_fsdp import lora_math, merge_adapter
from hf_qlora_fsdp.checking import check_adapter
from hf_qlora_fsdp.experts.layers import PROJECTIONS
from hf_qlora_fsdp.loading.sources import plan_checkpoint
from hf_qlora_fsdp.loading.weights import Weights, find_weights
from hf_qlora_fsdp.quantization import write_quantization
from tests.experts.test_experts import HIDDEN, INTERMEDIATE, NUM_EXPERTS, make_moe, pack_and_dequantize
from tests.loading.test_expert_recipes import build, quantize_stored, write_fused
from tests.merging.test_merging import (
    NF4,
    LiveBytes,
    assert_merged,
    changed,
    edit_config,
    edit_tensors,
    make_adapter,
    peft_model,
    round_to_4bit,
    same_bytes,
    tensors_of,
)

FORMS = ["mixtral", "qwen3_moe", "gpt_oss", "mixtral fused"]
EXPERTS0 = "base_model.model.model.layers.0.mlp.experts"
# PEFT 0.21 looks for what they match among modules alone, not among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(form: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"), form)


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return adapt(base, tmp_path_factory.mktemp("adapter"))


def write_base(folder: Path, form: str) -> str:
    # Every token goes to every expert: rounding a weight then moves logits a little, and never a token elsewhere.
    model = make_moe(form.partition(" ")[0], NUM_EXPERTS, dtype=torch.bfloat16)
    if form.endswith("fused"):
        write_fused(folder, model)
    else:
        model.save_pretrained(folder)
    return str(folder)


def adapt(base: str, folder: Path) -> str:
    """An adapter as this package writes it."""
    targets = [f"mlp.experts.{name}" for name in PROJECTIONS]
    ranks = {"experts.down_proj": 3}
    make_adapter(base, folder, target_modules=["q_proj"], target_parameters=targets, rank_pattern=ranks)
    kind = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    skipped = sorted(set(build(Path(base)).hf_quantizer.modules_to_not_convert))
    write_quantization(folder, kind | {"skip_modules": skipped})
    return str(folder)


def round_experts_too(base: str) -> Any:
    """The base as this package trains on it."""
    model = round_to_4bit(base, quant_type="nf4", compress_statistics=True)
    pack_and_dequantize(model, torch.bfloat16)
    return model


def test_onto_the_original_base(base: str, adapter: str, tmp_path: Path) -> None:
    output = merge_adapter(base, adapter, tmp_path / "merged", progress=False)
    assert_merged(output, peft_model(base, adapter))
    names = tensors_of(base)
    adapted = {name for name in names if "q_proj" in name or ".experts." in name}
    assert changed(base, output) == {name for name in adapted if not name.endswith("bias")}
    assert names.keys() == tensors_of(output).keys()
    report = check_adapter(adapter)
    assert report.ok and "6 parameters of" in str(report), str(report)


def test_onto_what_was_trained_against(base: str, adapter: str, tmp_path: Path) -> None:
    output = merge_adapter(base, adapter, tmp_path / "merged", base_weights="trained", progress=False)
    assert_merged(output, peft_model(round_experts_too(base), adapter))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def of_mixtral(mixtral: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return adapt(mixtral, tmp_path_factory.mktemp("of mixtral"))


def test_experts_that_were_not_in_4_bits_are_not_rounded(
    mixtral: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapt(mixtral, tmp_path / "adapter")
    (tmp_path / "adapter" / "base_quantization.json").unlink()
    output = merge_adapter(mixtral, adapter, tmp_path / "merged", base_weights="trained", progress=False)
    rounded = round_to_4bit(mixtral, quant_type="nf4", compress_statistics=True)
    assert_merged(output, peft_model(rounded, adapter))
    assert "Nothing says that experts were in 4 bits in training" in caplog.text


def test_4bit_output_keeps_experts_in_the_bits_they_had(mixtral: str, of_mixtral: str, tmp_path: Path) -> None:
    wide = tensors_of(merge_adapter(mixtral, of_mixtral, tmp_path / "wide", progress=False))
    small = tensors_of(merge_adapter(mixtral, of_mixtral, tmp_path / "small", save_4bit=True, progress=False))
    assert small["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    for name, tensor in wide.items():
        if ".experts." in name:
            assert same_bytes(small[name], tensor)


def test_experts_that_are_stored_in_4_bits(mixtral: str, of_mixtral: str, tmp_path: Path) -> None:
    """As bitsandbytes stored them when each was a linear layer: what is merged is the same, and so is the form."""
    folder = write_base(tmp_path / "base", "mixtral")
    quantize_stored(Path(folder), ".gate.", compress_statistics=True)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"quantization_config": NF4.to_dict()}))
    options: dict[str, Any] = {"base_weights": "trained", "progress": False}
    expected = tensors_of(merge_adapter(mixtral, of_mixtral, tmp_path / "expected", **options))
    merged = tensors_of(merge_adapter(folder, of_mixtral, tmp_path / "merged", **options))
    assert merged.keys() == expected.keys()
    routers = {name for name in merged if name.endswith(".gate.weight")}  # and so were these
    assert all(same_bytes(merged[name], expected[name]) for name in merged.keys() - routers)
    for name in routers:
        codes, state = bnb_functional.quantize_4bit(expected[name], quant_type="nf4", compress_statistics=True)
        assert same_bytes(merged[name], bnb_functional.dequantize_4bit(codes, state))
    small = merge_adapter(folder, of_mixtral, tmp_path / "small", save_4bit=True, **options)
    stored = {name: tensor for name, tensor in tensors_of(folder).items() if ".experts." in name or ".gate." in name}
    kept = {name: tensor for name, tensor in tensors_of(small).items() if name in stored}
    assert kept.keys() == stored.keys() and len(routers) == 2
    assert all(same_bytes(tensor, stored[name]) for name, tensor in kept.items() if ".gate." in name)
    built = build(small, bnb_4bit_quant_type="nf4")
    plan_checkpoint(built, Weights(find_weights(str(small))), torch.float32)


def test_stacked_experts_are_merged_one_at_a_time(
    of_mixtral: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = write_base(tmp_path / "base", "mixtral fused")
    monkeypatch.setattr(lora_math, "_BLOCK_BYTES", 1 << 12)
    with LiveBytes() as live:
        merge_adapter(fused, of_mixtral, tmp_path / "merged", base_weights="trained", device="cpu", progress=False)
    expert = 2 * 2 * INTERMEDIATE * HIDDEN
    factors = 4 * NUM_EXPERTS * (4 * (HIDDEN + 2 * INTERMEDIATE) + 3 * (INTERMEDIATE + HIDDEN))
    # What is written; of one expert: as stored, in its compute dtype, as codes, rounded, put together, and merged.
    assert NUM_EXPERTS * expert < live.peak <= (NUM_EXPERTS + 5) * expert + factors + 4 * (1 << 12)


def test_experts_that_are_replaced_as_a_whole(mixtral: str, of_mixtral: str, tmp_path: Path) -> None:
    """As `modules_to_save` does: the stack of the adapter is cut into the tensors of the base."""
    fused = write_base(tmp_path / "fused", "mixtral fused")
    adapter = make_adapter(mixtral, tmp_path / "adapter", target_modules=["k_proj"])
    stacks = {name: torch.randn_like(tensors_of(fused)[f"model.layers.0.mlp.experts.{name}"]) for name in PROJECTIONS}
    edit_tensors(lambda tensors: tensors.update({f"{EXPERTS0}.{name}": stack for name, stack in stacks.items()}))(
        Path(adapter)
    )
    merged = tensors_of(merge_adapter(mixtral, adapter, tmp_path / "merged", progress=False))
    for expert in range(NUM_EXPERTS):
        path = f"model.layers.0.block_sparse_moe.experts.{expert}"
        gate_up = torch.cat([merged[f"{path}.w1.weight"], merged[f"{path}.w3.weight"]])
        assert torch.equal(gate_up, stacks["gate_up_proj"][expert])
        assert torch.equal(merged[f"{path}.w2.weight"], stacks["down_proj"][expert])
    again = tensors_of(merge_adapter(fused, adapter, tmp_path / "again", progress=False))
    assert all(torch.equal(again[f"model.layers.0.mlp.experts.{name}"], stack) for name, stack in stacks.items())


DAMAGES = {
    "one pair of two": (
        edit_tensors(lambda tensors: [tensors.pop(f"{EXPERTS0}.base_layer.lora_{part}.weight") for part in "AB"]),
        "one pair of matrices for each, and some are missing",
    ),
    "half a pair": (
        edit_tensors(lambda tensors: tensors.pop(f"{EXPERTS0}.lora_A.weight")),
        "one of the two matrices is missing",
    ),
    "another number of experts": (
        edit_tensors(lambda tensors: tensors.update({f"{EXPERTS0}.lora_A.weight": torch.ones(6, INTERMEDIATE)})),
        r"shape \[6, 192\].*ask for \[24, 192\]",
    ),
    "another rank": (edit_config(rank_pattern={}), r"ask for \[(128, 32|32, 192)\]"),
    "one parameter more": (
        edit_config(target_parameters=["mlp.experts.down_proj"]),
        r"base_layer\.lora_A\.weight'.* belongs to no parameter",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, mixtral: str, of_mixtral: str, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "base_quantization.json"):
        (adapter / name).write_bytes((Path(of_mixtral) / name).read_bytes())
    save_file(load_file(f"{of_mixtral}/adapter_model.safetensors"), adapter / "adapter_model.safetensors")
    change(adapter)
    with pytest.raises(ValueError, match=words):
        merge_adapter(mixtral, str(adapter), tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
    assert not check_adapter(adapter).ok

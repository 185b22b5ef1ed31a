"""An adapter says how its base was quantised, a merge takes it from there, and contradictions are named.

What is written is tested by what it is for: merged with nothing said, an adapter that was trained on an unusual base
gives the logits of the trained model, and without the file it does not.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qlora_fsdp.checking import check_adapter
from hf_qlora_fsdp.merging.merger import merge_adapter
from hf_qlora_fsdp.quantization import QUANTIZATION_FILE, settle, write_quantization
from tests import training
from tests.distributed import RankPool
from tests.merging.test_merging import make_adapter
from tests.test_export import LOGIT_BOUND, logits_of
from tests.tiny import make_checkpoint

UNUSUAL: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "llm_int8_skip_modules": ["down_proj", "lm_head"],
}
RECORDED = {"quant_type": "fp4", "double_quant": False, "compute_dtype": "float16", "skip_modules": ["lm_head"]}


# ---- Written by a training, read by a merge --------------------------------------------------------------------------


def train_on_unusual_base(rank: int, folder: str, out: str) -> torch.Tensor:
    from transformers import BitsAndBytesConfig

    changes = {"folder": out, "param_dtype": "float32", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = BitsAndBytesConfig(**UNUSUAL)
    trainer = training.ours(folder, training.equal_rows(8), changes, quantization_config=config)
    trainer.train()
    trainer.save_model(f"{out}/final")
    return logits_of(trainer.model)


def load_plainly(rank: int, folder: str, adapter: str) -> torch.Tensor:
    """Load base and adapter with stock transformers and PEFT, quantised as the adapter's folder says."""
    from peft import PeftModel

    fields = json.loads(Path(adapter, QUANTIZATION_FILE).read_text())
    return logits_of(PeftModel.from_pretrained(training.plain_model(folder, torch.float32, **fields), adapter))


def test_the_base_of_the_training_is_found_again(ranks: RankPool, tmp_path: Path) -> None:
    folder, out = make_checkpoint(tmp_path / "model", dtype=torch.float32), tmp_path / "out"
    logits = ranks.run(train_on_unusual_base, folder, str(out))[0]
    for adapter in (out / "final", out / "checkpoint-2"):
        assert json.loads((adapter / QUANTIZATION_FILE).read_text()) == UNUSUAL
        assert check_adapter(adapter).ok
    atol = 2 * LOGIT_BOUND * logits.abs().max().item()  # a sum that is rounded before it is multiplied, or after
    plain = training.alone().run(load_plainly, folder, str(out / "final"))[0]
    assert torch.allclose(plain, logits, rtol=0, atol=atol)

    def merged(name: str) -> torch.Tensor:
        folder_of = merge_adapter(folder, str(out / "final"), tmp_path / name, base_weights="trained", progress=False)
        return logits_of(AutoModelForCausalLM.from_pretrained(folder_of))

    assert torch.allclose(merged("merged"), logits, rtol=0, atol=atol)
    (out / "final" / QUANTIZATION_FILE).unlink()
    assert (merged("guessed") - logits).abs().max() > 1000 * atol


# ---- Contradictions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> str:
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_quantization(folder, RECORDED)
    return folder


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_type": "nf4"}, ["quant_type='nf4' according to what was asked for", "quant_type='fp4' according to"]),
        ({"double_quant": True}, ["double_quant=True", "double_quant=False", "Leave double_quant out"]),
        ({"compute_dtype": "bfloat16"}, ["compute_dtype='bfloat16'", "compute_dtype='float16'"]),
        ({"skip_modules": ["lm_head", "up_proj"]}, ["['lm_head', 'up_proj']", "['lm_head'] were left so in training"]),
    ],
)
def test_what_is_said_and_what_is_recorded_must_agree(
    base: str, adapter: str, tmp_path: Path, said: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=QUANTIZATION_FILE) as raised:
        merge_adapter(base, adapter, tmp_path / "merged", base_weights="trained", progress=False, **said)
    for word in words:
        assert word in str(raised.value)
    assert not (tmp_path / "merged").exists()
    same = RECORDED | {"skip_modules": None}
    agreed = merge_adapter(base, adapter, tmp_path / "agreed", base_weights="trained", progress=False, **same)
    silent = merge_adapter(base, adapter, tmp_path / "silent", base_weights="trained", progress=False)
    assert (agreed / "merge.json").read_bytes() == (silent / "merge.json").read_bytes()


def test_a_base_that_is_stored_otherwise_is_refused(base: str, adapter: str, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match=r"'fp4' according to base_quantization.json.*'nf4' according to config"):
        merge_adapter(str(tmp_path / "stored"), adapter, tmp_path / "merged", base_weights="trained", progress=False)


def test_the_output_may_be_quantised_in_another_way(base: str, adapter: str, tmp_path: Path) -> None:
    """On the original weights, nothing has to be as in training; what is not said is as it was there."""
    for said, expected in (({}, "fp4"), ({"quant_type": "nf4"}, "nf4")):
        output = merge_adapter(base, adapter, tmp_path / expected, save_4bit=True, progress=False, **said)
        stored = json.loads((output / "config.json").read_text())["quantization_config"]
        assert (stored["bnb_4bit_quant_type"], stored["bnb_4bit_use_double_quant"]) == (expected, False)


def test_a_guess_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_qlora_fsdp"):
        assert settle({"quant_type": "fp4"}, {"the adapter": {}}, trained=True)["compute_dtype"] == "bfloat16"
        assert "taken to be compute_dtype='bfloat16', double_quant=True, skip_modules=None" in caplog.text
        caplog.clear()
        settle({}, {"the adapter": RECORDED}, trained=True)
        settle({}, {"the adapter": {}}, trained=False)
    assert not caplog.records


@pytest.mark.parametrize("content", ["", "[]", '{"load_in_4bit": true}'])
def test_a_damaged_record_is_refused(base: str, adapter: str, tmp_path: Path, content: str) -> None:
    Path(adapter, QUANTIZATION_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{QUANTIZATION_FILE}' does not say how the base was quantised"):
        merge_adapter(base, adapter, tmp_path / "merged", progress=False)
    assert not check_adapter(adapter).ok

"""What scripts do at their ends: run again when all is done, and call the model instead of the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint


def finish_and_rerun(rank: int, folder: str, out: str) -> dict[str, Any]:
    changes = {"folder": out, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    rows = training.equal_rows(8)
    trainer = training.ours(folder, rows, changes)
    trainer.train()
    after = training.adapter_of(trainer.model)
    trainer.model.save_pretrained(f"{out}/by-model")
    with pytest.raises(ValueError, match="hf-qlora-fsdp merge"):
        trainer.model.merge_and_unload()
    again = training.ours(folder, rows, changes)
    with training.listening() as said:
        output = again.train(resume_from_checkpoint=True)
    return {
        "after": after,
        "again": training.adapter_of(again.model),
        "steps": (output.global_step, again.state.global_step),
        "said": [line for line in said if "done" in line],
    }


def test_a_finished_run_is_not_trained_on(ranks: RankPool, tmp_path: Any) -> None:
    folder = make_checkpoint(tmp_path / "model")
    results = ranks.run(finish_and_rerun, folder, str(tmp_path / "out"))
    for result in results:
        assert result["steps"] == (2, 2)
        assert all(torch.equal(result["again"][name], tensor) for name, tensor in result["after"].items())
    assert len(results[0]["said"]) == 1 and results[1]["said"] == []
    saved = load_file(tmp_path / "out" / "by-model" / "adapter_model.safetensors")
    assert saved.keys() == results[0]["after"].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in results[0]["after"].items())


def generate_and_adapt(rank: int, folder: str, out: str) -> tuple[list[int], str]:
    from peft import LoraConfig, get_peft_model

    from hf_qlora_fsdp import load_quantized_model, save_adapter

    model = load_quantized_model(folder, progress=False)
    tokens = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    try:
        save_adapter(adapted, out)
    except RuntimeError as error:
        return tokens[0].tolist(), str(error)
    return tokens[0].tolist(), "saved"


def test_a_loaded_model_generates_and_refuses_an_adapter_that_nobody_reduces(ranks: RankPool, tmp_path: Any) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (tokens, said), (others, also) = ranks.run(generate_and_adapt, folder, str(tmp_path / "adapter"))
    assert tokens == others and len(tokens) > 3
    assert "nobody reduces" in said and "nobody reduces" in also
    assert not (tmp_path / "adapter").exists()

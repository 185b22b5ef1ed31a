"""Rows of the embedding that are trained alone (`trainable_token_indices`), tied to the head and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import training
from tests.distributed import RankPool
from tests.test_export import ADAPTER, LOGIT_BOUND, logits_of
from tests.test_sharding import INPUT_IDS, assert_identical, compute_sharded, reference_model, row_by_row
from tests.tiny import make_checkpoint

ROWS: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [7, 9, 60, 200]}}
NUM_STEPS = 3


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_gradients_of_rows_are_those_of_one_process(ranks, tmp_path, tie):
    folder = make_checkpoint(tmp_path, "llama", tie=tie)
    rows = {"trainable_token_indices": {"embed_tokens": sorted({*INPUT_IDS[0, :3].tolist(), 9})}}
    expected = row_by_row(reference_model(folder, torch.bfloat16, **rows))
    (name,) = (name for name in expected[0]["gradients"] if "trainable_tokens_delta" in name)
    assert expected[0]["gradients"][name].any()
    variants = [{"dtype": torch.bfloat16, **rows, **way} for way in ({}, {"checkpointing": True}, {"offload": True})]
    for rank, results in enumerate(ranks.run(compute_sharded, folder, variants)):
        for computed in results:
            assert_identical(computed, expected[rank])


# ---- Trained, saved, resumed -----------------------------------------------------------------------------------------


def train_rows(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Train, saving every step; then again from the first, offloaded."""
    changes = {"folder": out, "param_dtype": "float32", "max_steps": NUM_STEPS}
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = training.ours(folder, training.equal_rows(8), changes | saving, ROWS)
    first = training.adapter_of(trainer.model)
    whole = training.run(trainer)
    logits = logits_of(trainer.model)
    again = training.ours(folder, training.equal_rows(8), changes | {"cpu_offload": True}, ROWS)
    resumed = training.run(again, resume_from_checkpoint=f"{out}/checkpoint-1")
    return {"first": first, "whole": whole, "logits": logits, "resumed": resumed}


def train_rows_plainly(rank: int, folder: str, out: str, first: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Train the same with plain TRL and PEFT, the batches of both ranks in one; load what ours has saved."""
    from peft import PeftModel

    changes = {"folder": f"{out}/plain", "max_steps": NUM_STEPS, "per_device_train_batch_size": 2}
    trainer = training.stock(folder, training.equal_rows(8), changes, torch.float32, ROWS)
    head = trainer.model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper of a tied head; TRL 1.16 reads it and falls over
        head.register_parameter("bias", None)
    training.fill_adapter(trainer.model, first)
    loaded = PeftModel.from_pretrained(training.plain_model(folder, torch.float32), f"{out}/checkpoint-{NUM_STEPS}")
    return {"run": training.run(trainer), "logits": logits_of(loaded)}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_rows_are_trained_saved_loaded_and_resumed(ranks: RankPool, tmp_path: Path, tie: bool) -> None:
    folder, out = make_checkpoint(tmp_path / "model", tie=tie, dtype=torch.float32), str(tmp_path / "out")
    result = ranks.run(train_rows, folder, out)[0]
    whole, resumed = result["whole"], result["resumed"]
    (name,) = (name for name in whole.adapter if "trainable_tokens_delta" in name)
    assert whole.adapter[name].shape == (4, 128)
    assert not torch.equal(whole.adapter[name], result["first"][name])

    stored = load_file(Path(out, f"checkpoint-{NUM_STEPS}", ADAPTER))
    assert stored.keys() == {key.removesuffix(".default") for key in whole.adapter}
    for key, tensor in whole.adapter.items():
        assert torch.equal(tensor, stored[key.removesuffix(".default")]), key
    assert resumed.losses == whole.losses and resumed.grad_norms == whole.grad_norms
    assert len(whole.losses) == NUM_STEPS
    for key, tensor in whole.adapter.items():
        assert torch.equal(tensor, resumed.adapter[key]), key

    plain = training.alone().run(train_rows_plainly, folder, out, result["first"])[0]
    atol = LOGIT_BOUND * plain["logits"].abs().max().item()
    assert torch.allclose(result["logits"], plain["logits"], rtol=0, atol=atol)
    rel = NUM_STEPS * 256**0.5 * 2**-24  # see test_trainer.py
    assert whole.losses == pytest.approx(plain["run"].losses, rel=rel)
    assert whole.grad_norms == pytest.approx(plain["run"].grad_norms, rel=rel)


def tie_copies(rank: int, folder: str, out: str) -> list[tuple[str, str]]:
    asked = ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]})
    return [
        training.refusal(
            training.ours, folder, training.equal_rows(8), {"folder": out}, peft | {"ensure_weight_tying": True}
        )
        for peft in asked
    ]


def test_copies_of_tied_weights_that_shall_stay_tied_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    """They were trained apart, and PEFT, which ties them again, then computed other logits than the trained model."""
    folder = make_checkpoint(tmp_path / "model", tie=True)
    for refused in ranks.run(tie_copies, folder, str(tmp_path / "out")):
        for kind, message in refused:
            assert kind == "ValueError" and "ensure_weight_tying=True and trains 'lm_head'" in message, message

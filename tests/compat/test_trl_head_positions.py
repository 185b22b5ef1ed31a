"""The head of TRL does not wait for the device where nearly all positions have labels, and computes the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from hf_qlora_fsdp import compat
from hf_qlora_fsdp.compat.trl_head_positions import PATCH, counted_labels


def labels_with(num_ignored: int) -> torch.Tensor:
    labels = torch.arange(2 * 17).view(2, 17) % 30
    labels[:, 0] = -100  # predicted by nothing, so it does not count
    labels[0, 1 : 1 + num_ignored] = -100
    return labels


def test_positions_are_picked_where_that_spares_something():
    picks = PATCH.build(lambda device: device.type == "cuda")
    gpu = torch.device("cuda", 0)
    assert picks(gpu)  # nobody has counted
    for num_ignored, expected in ((0, False), (4, False), (5, True), (16, True)):
        with counted_labels(labels_with(num_ignored)):
            assert picks(gpu) is expected
            assert picks(torch.device("cpu")) is False
            with counted_labels(None):
                assert picks(gpu)
            assert picks(gpu) is expected
    with pytest.raises(KeyError), counted_labels(labels_with(0)):
        raise KeyError
    assert picks(gpu)


@pytest.fixture
def patched() -> Iterator[None]:
    compat.apply(PATCH)
    yield
    compat.revert(PATCH)


def test_it_is_put_in_place_and_taken_away(patched):
    assert utils._use_triton.__module__ == PATCH.build.__module__
    compat.revert(PATCH)
    assert utils._use_triton.__module__ != PATCH.build.__module__


def run_head(num_ignored: int, counted: bool, may_wait: bool) -> list[torch.Tensor]:
    """Return the loss, entropy, accuracy and gradients of a tiny model on a GPU."""
    torch.manual_seed(0)
    config = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2)).to("cuda:0", torch.bfloat16)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = labels_with(num_ignored).to("cuda:0")
    ids = labels.clamp(min=0)
    model(input_ids=ids, labels=labels, fused_lm_head=True)  # what is found out once
    with counted_labels(labels if counted else None):
        torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
        try:
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    output.loss.backward()
    return [output.loss, output.entropy.sum(), output.is_top1.sum(), *(p.grad for p in model.parameters())]


@pytest.mark.gpu
@pytest.mark.xfail(strict=True, reason="the head reads how many positions have labels; if it passes, delete the patch")
def test_upstream_still_broken():
    run_head(0, counted=False, may_wait=False)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ignored", [0, 4])
def test_patch_fixes_it(patched, num_ignored):
    mine, theirs = run_head(num_ignored, True, may_wait=False), run_head(num_ignored, False, may_wait=True)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-4)
    assert torch.equal(mine[2], theirs[2])

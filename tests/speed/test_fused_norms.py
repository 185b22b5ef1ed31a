"""Norms run as one function where that computes the same, and as transformers has them anywhere else."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_qlora_fsdp.speed import fused_norms
from hf_qlora_fsdp.speed.fused_norms import fuse_norms, unfuse_norms

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


@pytest.fixture
def calls(monkeypatch):
    seen: list[nn.Module] = []

    def watch(x, norm, of=fused_norms.apply_rms_norm):
        seen.append(norm)
        return of(x, norm)

    monkeypatch.setattr(fused_norms, "apply_rms_norm", watch)
    return seen


def make_norm(kind: type = LlamaRMSNorm) -> nn.Module:
    norm = kind(64, 1e-5).to(torch.bfloat16).requires_grad_(False)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize(("family", "num_norms"), [("llama", 5), ("mistral", 5), ("qwen3", 9)])
def test_models_compute_the_same_with_all_their_norms_fused(family, num_norms, calls):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).requires_grad_(False)
    ids = torch.randint(0, 128, (2, 10))
    before = model(ids).logits
    assert [fuse_norms(model), fuse_norms(model)] == [num_norms, num_norms]  # again, as a second trainer does
    after = model(ids).logits
    assert torch.equal(before, after) and len(calls) == num_norms
    unfuse_norms(model)
    model(ids)
    assert len(calls) == num_norms


def test_a_norm_that_computes_something_else_is_left_alone(calls):
    class Doubling(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class OfDifferences(nn.Module):
        """Its instructions are those of the usual one; the names in them are others."""

        def __init__(self, size: int, eps: float) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.sub(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    class OfCubes(OfDifferences):
        """Likewise, with another number."""

        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(3).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    trained, replaced, learnt = make_norm(), make_norm(), make_norm()
    trained.weight.requires_grad_(True)
    replaced.forward = torch.neg
    learnt.variance_epsilon = torch.tensor(1e-5)
    others = [make_norm(kind) for kind in (GptOssRMSNorm, Doubling, OfDifferences, OfCubes)]
    assert fuse_norms(nn.ModuleList([*others, trained, replaced, learnt])) == 0
    assert torch.equal(replaced(torch.ones(64)), -torch.ones(64))


def test_a_call_that_is_not_usual_runs_as_the_class_has_it(calls, caplog):
    norm, x = make_norm(), torch.randn(3, 64)
    expected = norm(x)
    fuse_norms(norm)
    fused_norms._say_dtypes_differ.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert torch.equal(norm(x), expected) and expected.dtype == torch.float32  # a weight in bfloat16
        norm(x)
    (said,) = caplog.messages
    assert "was given float32, and its weight is in bfloat16" in said
    norm.weight.requires_grad_(True)
    norm(x.to(torch.bfloat16)).sum().backward()
    assert norm.weight.grad is not None and calls == []
    norm.weight.requires_grad_(False)
    norm(x.to(torch.bfloat16))
    assert calls == [norm]
    parametrize.register_parametrization(norm, "weight", nn.Identity())  # the weight is no parameter of its own now
    assert torch.equal(norm(x), expected) and calls == [norm]


def test_what_is_kept_beside_a_trained_norm_is_no_fused_one(calls):
    """Nobody calls it, but counted it would keep Liger's norms from those that are trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "layernorm"]))
    assert fuse_norms(model) == 0
    model(torch.zeros(1, 2, dtype=torch.int64))
    assert calls == []

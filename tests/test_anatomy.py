"""A model is cut by its own description: the units of families that differ in ends, names and ties."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, Llama4TextConfig, PreTrainedModel

from hf_qlora_fsdp.anatomy import Unit, build_meta_model, decoder_layers, is_tied, keep_in_float32, plan_units
from tests.tiny import make_model

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 128,
    "intermediate_size": 128,
}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}

# Configs, and the embedding, the norm, the head, and the layers in each one's own words.
NAMES = {
    "llama": (LLAMA_LIKE, "model.embed_tokens", "model.norm", "lm_head", "model.layers"),
    "gemma2": (LLAMA_LIKE, "model.embed_tokens", "model.norm", "lm_head", "model.layers"),
    "phi3": (LLAMA_LIKE, "model.embed_tokens", "model.norm", "lm_head", "model.layers"),
    "phi": (LLAMA_LIKE, "model.embed_tokens", "model.final_layernorm", "lm_head", "model.layers"),
    "gpt2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128},
        "transformer.wte",
        "transformer.ln_f",
        "lm_head",
        "transformer.h",
    ),
    "falcon": (SIZES, "transformer.word_embeddings", "transformer.ln_f", "lm_head", "transformer.h"),
    "opt": (
        {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 128},
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        "lm_head",
        "model.decoder.layers",
    ),
}


def build(model_type: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**NAMES[model_type][0], **changes})
    return build_meta_model(config, torch.bfloat16)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", NAMES)
def test_units(model_type, tie):
    _, embedding, norm, head, layers = NAMES[model_type]
    model = build(model_type, tie_word_embeddings=tie)
    assert is_tied(model) is tie
    middle = [Unit(f"{layers}.{index}", (f"{layers}.{index}",), is_decoder_layer=True) for index in range(2)]
    if tie:
        expected = [Unit("embedding, norm and head", (embedding, norm, head), keep_gathered=True), *middle]
    else:
        ends = Unit("norm and head", (norm, head), keep_gathered=True)
        expected = [Unit("embedding", (embedding,)), *middle, ends]
    assert plan_units(model) == expected


def test_every_parameter_is_in_one_unit_or_is_left_to_the_root():
    model = build("gpt2", tie_word_embeddings=False)
    names = [name for unit in plan_units(model) for name in unit.modules]
    covered = [name for name, _ in model.named_parameters() if sum(name.startswith(f"{unit}.") for unit in names) == 1]
    assert {name for name, _ in model.named_parameters()} - set(covered) == {"transformer.wpe.weight"}


def test_parameters_have_no_memory_and_buffers_are_real():
    model = build("llama")
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    real = make_model("llama", hidden_size=64, head_dim=32, num_attention_heads=2)
    inv_freq = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, dict(real.named_buffers())["model.rotary_emb.inv_freq"])


def test_weights_without_memory_are_not_initialised(monkeypatch):
    initialised = []
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: initialised.append(module))
    make_model("llama")
    assert initialised
    initialised.clear()
    build("llama")
    assert not initialised


def test_experts_made_of_zeros_take_no_memory_either():
    """Llama 4's, a layer of which has gigabytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "intermediate_size_mlp": 512, "num_local_experts": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = Llama4TextConfig(**sizes, **heads, num_hidden_layers=2, moe_layers=[0, 1], vocab_size=64)
    made: list[int] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.namespace == "aten" and "zeros" in func.__name__ and not result.is_meta:
                made.append(result.numel())
            return result

    with Seen():
        model = build_meta_model(config, torch.bfloat16)
    experts = model.model.layers[0].feed_forward.experts.gate_up_proj
    assert experts.is_meta and experts.shape == (16, 1024, 1024) and experts.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert max(made, default=0) < 16 * 1024 * 512


def test_class_to_wrap_can_be_given():
    model = build("llama")
    assert list(decoder_layers(model, ["LlamaMLP"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_wrong_class_lists_the_real_ones():
    with pytest.raises(ValueError, match=r"\['MistralDecoderLayer'\], but LlamaForCausalLM.*\['LlamaDecoderLayer'\]"):
        decoder_layers(build("llama"), ["MistralDecoderLayer"])
    with pytest.raises(ValueError, match=r"\['Typo'\], but LlamaForCausalLM"):  # a right name hides no wrong one
        decoder_layers(build("llama"), ["LlamaDecoderLayer", "Typo"])


def test_layers_are_found_without_a_word_of_the_author():
    model = build("llama")
    model._no_split_modules = None
    assert list(decoder_layers(model)) == ["model.layers.0", "model.layers.1"]


def test_layers_are_found_again_after_sharding_has_renamed_their_class():
    from torch.distributed.fsdp import FSDPModule

    model = build("llama")
    for layer in model.model.layers:
        layer.__class__ = type("FSDPLlamaDecoderLayer", (FSDPModule, type(layer)), {})
    assert list(decoder_layers(model)) == ["model.layers.0", "model.layers.1"]


def test_what_stays_in_float32_is_asked_of_the_model():
    model = build("llama")
    assert keep_in_float32(model, torch.bfloat16) == []
    model._keep_in_fp32_modules_strict = {"post_attention_layernorm"}
    assert keep_in_float32(model, torch.bfloat16) == ["post_attention_layernorm"]
    assert keep_in_float32(model, torch.float32) == []

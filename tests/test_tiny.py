"""The tiny checkpoints are what tests take them for: loadable, repeatable, and random wherever a mistake could hide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, SLIDING_WINDOW, make_checkpoint, make_model, make_tokenizer, tiny_dataset

TEXT = "2 + 2 = 4, naïve café 🙂"


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_loads_as_it_was_made(tmp_path: Path, model_type: str, tie: bool) -> None:
    path = make_checkpoint(tmp_path / "model", model_type, tie=tie)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    made = make_model(model_type, tie=tie).state_dict()
    assert loaded.config.model_type == model_type
    assert loaded.state_dict().keys() == made.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, made[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_parameter_is_left_at_a_neutral_value(model_type: str) -> None:
    for name, parameter in make_model(model_type, dtype=torch.float32).named_parameters():
        assert parameter.std() > 0.03, name
        assert parameter.unique().numel() > 0.9 * parameter.numel(), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_quantised_matrices_fill_whole_blocks(model_type: str) -> None:
    for name, parameter in make_model(model_type).named_parameters():
        if parameter.ndim >= 2 and "router" not in name and "gate.weight" not in name:
            assert all(size % 64 == 0 for size in parameter.shape[-2:]), name


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_sliding_window_matters(model_type: str) -> None:
    tokens = torch.arange(6, 6 + 3 * SLIDING_WINDOW)[None]
    narrow = make_model(model_type, dtype=torch.float32)
    wide = make_model(model_type, dtype=torch.float32, sliding_window=256)
    with torch.no_grad():
        difference = (narrow(tokens).logits - wide(tokens).logits).abs().amax(dim=(0, 2))
    assert difference[: SLIDING_WINDOW - 1].max() < 1e-5
    assert difference[-1] > 1e-3


def test_qwen2_has_biases() -> None:
    assert any(name.endswith("q_proj.bias") for name, _ in make_model("qwen2").named_parameters())


def test_seeds_and_overrides_reach_the_weights() -> None:
    weight = make_model().lm_head.weight
    assert not torch.equal(weight, make_model(seed=1).lm_head.weight)
    assert len(make_model(num_hidden_layers=3).model.layers) == 3


def test_making_a_model_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_model()
    assert torch.equal(torch.rand(4), expected)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    whole = load_file(Path(make_checkpoint(tmp_path / "whole")) / "model.safetensors")
    split = Path(make_checkpoint(tmp_path / "split", max_shard_size="100KB"))
    index = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    files = set(index.values())
    assert len(files) > 3
    tensors = {name: tensor for file in files for name, tensor in load_file(split / file).items()}
    assert tensors.keys() == whole.keys() == index.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_saved_tokenizer_is_the_one_made(tmp_path: Path, model_type: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path, model_type))
    made = make_tokenizer()
    assert tokenizer(TEXT).input_ids == made(TEXT).input_ids
    assert tokenizer.decode(made(TEXT).input_ids) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert max(made(TEXT).input_ids) < len(made) <= 512


def test_the_chat_template_marks_the_assistant() -> None:
    tokenizer = make_tokenizer()
    messages = tiny_dataset(1, "conversational")[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == messages[1]["content"] + "<eos>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompt)


def test_datasets_say_the_same_in_every_form() -> None:
    texts = tiny_dataset(20)["text"]
    pairs = tiny_dataset(20, "prompt_completion")
    chats = tiny_dataset(20, "conversational")["messages"]
    assert list(texts) == [row["prompt"] + row["completion"] for row in pairs]
    assert list(texts) == ["".join(message["content"] for message in chat) for chat in chats]
    assert len(set(map(len, texts))) > 3
    assert list(tiny_dataset(20, seed=1)["text"]) != list(texts)

"""Checkpoints and data sets small enough for a test, made on the spot and without a network.

A tiny model is only worth testing with if a mistake shows. Freshly initialised models hide most of them: norms are
exactly one (or, in Gemma, an offset of exactly zero), biases are zero, and every sliding window is longer than the
input. So here each parameter is drawn anew from a seed: matrices with a realistic spread, biases away from zero, norms
around their neutral value, and windows of `SLIDING_WINDOW` tokens that a test's input outgrows. All sizes are multiples
of 64, bitsandbytes' usual block.

The tokenizer knows every byte, so any text survives the way there and back, and its chat template marks the assistant's
words with `{% generation %}`, as TRL's assistant-only loss requires.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
HIDDEN_SIZE = 128
SLIDING_WINDOW = 16

# Id = position. The bytes follow, and the rest of the vocabulary stays unused, as in many real checkpoints.
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<assistant>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "<user>{{ message['content'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# What a family's configuration needs beyond the sizes that all of them share.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {},  # its q, k and v projections have biases
    "qwen3": {},
    "gemma2": {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": SLIDING_WINDOW},  # fuses q, k and v, and gate and up
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_checkpoint(
    path: str | Path,
    model_type: str = "llama",
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> str:
    """Write a random model of two layers, with its tokenizer, as `save_pretrained` writes a real one.

    Args:
        path (`str` or `Path`): The folder to write to; made if it does not exist.
        model_type (`str`): One of `FAMILIES`.
        tie (`bool`): Whether the output embedding is the input embedding.
        dtype (`torch.dtype`): What the weights are stored in.
        max_shard_size (`int` or `str`, *optional*): Splits the weights into files of at most this size, in bytes or as
            `"100KB"`.
        seed (`int`): Draws the weights; the same seed gives the same bytes.
        **overrides (`Any`): Fields of the family's configuration.

    Returns:
        `str`: `path` as a string, which is what trainers take for a model id.
    """
    model = make_model(model_type, tie=tie, dtype=dtype, seed=seed, **overrides)
    split: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(path, **split)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_model(
    model_type: str = "llama",
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Build the model of [`make_checkpoint`] in memory."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **FAMILIES[model_type], **overrides})
    with torch.random.fork_rng(devices=[]):  # leave the test's own random numbers alone
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw_parameters(model, seed)
    return model


@torch.no_grad()
def draw_parameters(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew, in fp32 and in a fixed order, then round it to the dtype it is stored in.

    Vectors are norms, which stay around their neutral value (one, or Gemma's zero), and biases, which start at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.04 * noise)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def tiny_dataset(num_rows: int, form: str = "text", seed: int = 0) -> Dataset:
    """Return sums to learn, in rows of unequal length.

    Args:
        num_rows (`int`): How many.
        form (`str`): `"text"`, `"prompt_completion"`, or `"conversational"`, a column `messages` of two turns.
        seed (`int`): Draws the numbers.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        terms = [rng.randrange(100) for _ in range(rng.randint(2, 5))]
        question, answer = " + ".join(map(str, terms)) + " =", f" {sum(terms)}"
        rows.append(ROW_FORMS[form](question, answer))
    return Dataset.from_list(rows)


ROW_FORMS = {
    "text": lambda question, answer: {"text": question + answer},
    "prompt_completion": lambda question, answer: {"prompt": question, "completion": answer},
    "conversational": lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    },
}

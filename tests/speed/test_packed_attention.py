"""A packed sequence has the logits, losses and gradients that it has alone.

What is compared with is each sequence run by itself with plain SDPA, in float32, and float64 says which of the two is
right: packed, the error may be at most half as large again as alone. Batches that are not packed are SDPA's, bit for
bit. The kernel for lengths exists on GPUs only; it is held against the same.
"""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from hf_qlora_fsdp.speed import packed_attention
from hf_qlora_fsdp.speed.packed_attention import NAME, attend, find_varlen, use_packed_attention
from tests import training
from tests.distributed import RankPool
from tests.tiny import draw_parameters, make_checkpoint, make_model

LENGTHS = (11, 1, 30, 6)


def draw_rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 261, (1, length), generator=generator) for length in LENGTHS]


def pack(rows: list[torch.Tensor]) -> dict[str, Any]:
    """Return what TRL's collator makes of rows when there is no padding."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "use_cache": False,
    }


def compute(model: Any, packed: bool) -> list[torch.Tensor]:
    """Return logits, and the gradients of a weight of each layer."""
    rows = draw_rows()
    if packed:
        logits = model(**pack(rows)).logits[0]
    else:
        logits = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
    weights = [layer.self_attn.k_proj.weight for layer in model.model.layers]
    return [logits, *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), weights)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_pack_equals_its_sequences(family: str) -> None:
    alone = make_model(family, dtype=torch.float32)
    packed = copy.deepcopy(alone)
    assert use_packed_attention(packed) and packed.config._attn_implementation == NAME
    exact = compute(copy.deepcopy(alone).double(), packed=False)
    for ours, theirs, true in zip(compute(packed, True), compute(alone, False), exact, strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


def test_a_mask_would_have_been_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what is saved here; that transformers makes it says that the batch is taken for a packed one."""
    made: list[torch.Size] = []
    sdpa_mask = masking_utils.sdpa_mask

    def watched(*args: Any, **kwargs: Any) -> Any:
        mask = sdpa_mask(*args, **kwargs)
        made.extend([] if mask is None else [mask.shape])
        return mask

    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "sdpa", watched)
    monkeypatch.setattr(packed_attention, "sdpa_mask", watched)
    model = make_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model(**pack(draw_rows()))
        assert made == [(1, 1, sum(LENGTHS), sum(LENGTHS))]
        use_packed_attention(model)
        model(**pack(draw_rows()))
    assert len(made) == 1


@torch.no_grad()
def test_other_batches_are_left_to_sdpa() -> None:
    plain = make_model("llama", dtype=torch.float32)
    model = copy.deepcopy(plain)
    use_packed_attention(model)
    model(**pack(draw_rows()))
    ids = torch.randint(5, 261, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    without_lengths = {name: value for name, value in pack(draw_rows()).items() if not name.startswith(("cu", "max"))}
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}, without_lengths):
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(
    ("family", "chosen", "reason"),
    [("mistral", "sdpa", "has a window"), ("gemma3_text", "sdpa", "has a window"), ("llama", "eager", "was asked for")],
)
def test_the_mask_is_kept_where_attention_has_more_to_it(
    family: str, chosen: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    model.set_attn_implementation(chosen)
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert not use_packed_attention(model)
    assert model.config._attn_implementation == chosen
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


def make_other(family: str) -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=1, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_parameters(model, 0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_the_mask_is_kept_where_attention_would_not_hear_of_it(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_other(family)
    expected = model(**pack(draw_rows())).logits
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert not use_packed_attention(model)
    assert torch.equal(model(**pack(draw_rows())).logits, expected)
    assert len(caplog.messages) == 1 and "do not tell their attention" in caplog.messages[0]


@torch.no_grad()
@pytest.mark.parametrize(("family", "reason"), [("falcon", "cannot be replaced"), ("gpt_oss", "was asked for")])
def test_what_would_mix_sequences_is_refused(family: str, reason: str) -> None:
    """Were the second sequence of a pack what it is alone, there would be nothing to refuse any more."""
    model = make_other(family)
    alone, packed = model(draw_rows()[2]).logits[0], model(**pack(draw_rows())).logits[0, 12:42]
    assert (packed - alone).norm() > 0.01 * alone.norm()
    with pytest.raises(ValueError, match=reason):
        use_packed_attention(model)


# ---- In training -----------------------------------------------------------------------------------------------------


def train_packed(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Train a step on packed rows, and compute the mean loss of the same rows alone, before."""
    from datasets import Dataset

    rows = [row[0].tolist() for row in draw_rows()] * 6
    changes = {"folder": out, "max_steps": 1, "packing": True, "max_length": 64, "param_dtype": "float32"}
    trainer = training.ours(folder, Dataset.from_dict({"input_ids": rows}), changes | {"gradient_checkpointing": True})
    own = next(iter(trainer.get_train_dataloader()))
    starts = own["cu_seq_lens_q"].tolist()
    sums, num_tokens = 0.0, 0
    model = trainer.model
    with torch.no_grad():
        for start, stop in [*itertools.pairwise(starts)] + [(0, 2)] * (16 - len(starts)):
            ids = own["input_ids"][:, start:stop]
            logits = model(input_ids=ids, use_cache=False).logits.double()
            if stop - start > 1 and (start, stop) != (0, 2):
                losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
                sums, num_tokens = sums + losses.item(), num_tokens + stop - start - 1
    name = model.get_base_model().config._attn_implementation
    return {"sums": sums, "tokens": num_tokens, "loss": training.run(trainer).losses[0], "attention": name}


def test_the_trainer_uses_it(ranks: RankPool, tmp_path: Any) -> None:
    """The first loss is the mean over all tokens of both ranks; float32 sums of some hundred terms err by 2^-20."""
    results = ranks.run(train_packed, make_checkpoint(tmp_path / "model"), str(tmp_path / "out"))
    assert {result["attention"] for result in results} == {NAME}
    mean = sum(result["sums"] for result in results) / sum(result["tokens"] for result in results)
    assert results[0]["loss"] == pytest.approx(mean, rel=2**-20, abs=0)


@pytest.mark.parametrize("around", ["checkpointing", "inference mode"])
def test_the_kernel_is_tried_without_regard_to_what_is_around(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried in the first forward of a layer. The kernel itself is for GPUs alone, so SDPA stands in for it."""
    monkeypatch.setattr(packed_attention, "_attend_varlen", packed_attention._attend_in_turn)
    find_varlen.cache_clear()
    said: list[Any] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        h = x.exp()
        said.append(find_varlen(torch.device("cpu"), torch.float32, 4, 2, 8, 16))
        return h.exp()

    x = torch.ones(3, requires_grad=True)
    if around == "checkpointing":
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, torch.autograd.grad(x.exp().exp().sum(), x)[0])
    else:
        with torch.inference_mode():
            layer(x)
    find_varlen.cache_clear()
    assert said and all(said)


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_kernel_for_lengths(num_kv_heads: int) -> None:
    assert find_varlen(torch.device("cuda", 0), torch.bfloat16, 4, num_kv_heads, 64, 64)
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.tensor([0, 300, 301, 512], dtype=torch.int32, device="cuda")
    shapes = [(1, heads, 512, 64) for heads in (4, num_kv_heads, num_kv_heads)]
    tensors = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]

    def run(dtype: torch.dtype, start: int, stop: int, lengths: Any) -> list[torch.Tensor]:
        inputs = [tensor[:, :, start:stop].to(dtype).requires_grad_() for tensor in tensors]
        named = {} if lengths is None else {"cu_seq_lens_q": lengths, "max_length_q": 300}
        layer = torch.nn.Module()
        layer.num_key_value_groups = 4 // num_kv_heads
        out, _ = attend(layer, *inputs, None, **named)
        return [out.transpose(1, 2), *torch.autograd.grad(out.square().sum(), inputs)]

    def alone(dtype: torch.dtype) -> list[torch.Tensor]:
        bounds = itertools.pairwise(starts.tolist())
        return [torch.cat(parts, dim=2) for parts in zip(*(run(dtype, *bound, None) for bound in bounds), strict=True)]

    packed = run(torch.bfloat16, 0, 512, starts)
    for ours, theirs, true in zip(packed, alone(torch.bfloat16), alone(torch.float64), strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


@pytest.mark.gpu
def test_the_kernel_is_found_and_used_in_layers_that_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    kernel = packed_attention._attend_varlen
    monkeypatch.setattr(packed_attention, "_attend_varlen", lambda *args: used.append(1) or kernel(*args))
    find_varlen.cache_clear()
    model = make_model("llama", dtype=torch.bfloat16).cuda().train()
    assert use_packed_attention(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in pack(draw_rows()).items()
    }
    model(**batch).logits.float().square().mean().backward()
    assert len(used) == 1 + 2 * 2  # the trial, and two layers, each twice
    assert all(layer.self_attn.k_proj.weight.grad.any() for layer in model.model.layers)

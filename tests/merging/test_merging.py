"""A merged model is base plus adapter, no more and no less.

The reference is PEFT itself, unmerged and in float64: base and adapter, loaded from the same two folders. The merged
folder, loaded by transformers and computed in float64 too, may differ from it by what rounding the merged weights to
their dtype makes of the logits, and that is measured by rounding PEFT's own merged weights.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_qlora_fsdp import lora_math, merge_adapter
from hf_qlora_fsdp.cli import WHICH_BASE, main
from hf_qlora_fsdp.loading.weights import Weights, find_weights
from hf_qlora_fsdp.merging.shards import ShardWriter
from tests.loading.test_weights import cache_as_hub_would
from tests.tiny import draw_parameters, make_checkpoint, make_tokenizer

ROOT = Path(__file__).parents[2]
IDS = torch.randint(5, 512, (2, 24), generator=torch.Generator().manual_seed(0))
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[..., str]:
    """Makes a tiny checkpoint, once for each set of arguments."""
    made: dict[str, str] = {}

    def make(model_type: str = "llama", **options) -> str:
        key = f"{model_type} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            made[key] = make_gpt2(folder) if model_type == "gpt2" else make_checkpoint(folder, model_type, **options)
        return made[key]

    return make


def make_gpt2(folder: Path) -> str:
    """A model whose layers are Conv1D, which stores its weights transposed, and whose head is tied."""
    sizes = {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = AutoConfig.for_model("gpt2", bos_token_id=1, eos_token_id=2, **sizes, **no_dropout)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    draw_parameters(model, seed=0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT warns of adapters on embeddings, tied weights and biases, and of merging them: all wanted here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@torch.no_grad()
def make_adapter(base: str, folder: Path, seed: int = 1, **options) -> str:
    """Let stock PEFT write an adapter whose every tensor is away from its initial value."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    with quiet_peft():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 0.1 * noise * parameter.float().abs() if "magnitude" in name else 0.04 * noise
            parameter += scaled.to(parameter.dtype)
    with quiet_peft():
        model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    return model.double().eval()(input_ids=IDS % model.config.vocab_size, use_cache=False).logits


def peft_model(base: str | PreTrainedModel, adapter: str) -> PeftModel:
    """Base and adapter in float64, not merged."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) if isinstance(base, str) else base.double()
    with quiet_peft():
        return PeftModel.from_pretrained(model, adapter).double()


@torch.no_grad()
def assert_merged(output: Path, reference: PeftModel, dtype: torch.dtype = torch.bfloat16, factor: float = 2) -> None:
    """Assert that a folder's logits are the reference's, but for the rounding of the merged weights."""
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)
    expected = logits_of(reference)
    untie(reference)
    with quiet_peft():
        rounded = reference.merge_and_unload()
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(dtype))
    rounding = (logits_of(rounded) - expected).abs().max()
    without = (logits_of(merged) - expected).abs().max()
    assert 0 < rounding < 0.1 * expected.abs().max()
    assert without <= factor * rounding


def untie(model: torch.nn.Module) -> None:
    """Give each of two tied weights its own memory: PEFT merges what is meant for one of them into both."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = torch.nn.Parameter(parameter.clone())
            seen.add(id(module._parameters[name]))


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    weights = Weights(find_weights(str(folder)))
    return {name: weights.read(name) for name in weights.tensors}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def changed(base: str, output: Path) -> set[str]:
    """Return the stored names whose bytes are not the base's."""
    before, after = tensors_of(base), tensors_of(output)
    return {name for name in before | after if name not in before or not same_bytes(before[name], after[name])}


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = {"self_attn." + name for name in ATTENTION} | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def layers(*parts: str) -> set[str]:
    return {f"model.layers.{index}.{part}.weight" for index in range(2) for part in parts}


CASES: dict[str, tuple[dict, dict, set[str]]] = {
    "llama": ({}, {}, layers(*LINEAR)),
    "one file": ({"max_shard_size": None}, {"target_modules": ["q_proj"]}, layers("self_attn.q_proj")),
    "rsLoRA": ({}, {"use_rslora": True}, layers(*LINEAR)),
    "patterns": (
        {},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"^model.layers.0.*v_proj": 32}},
        layers(*LINEAR),
    ),
    "DoRA": (
        {},
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        layers("self_attn.q_proj", "mlp.down_proj"),
    ),
    "DoRA embedding": ({}, {"use_dora": True, "target_modules": ["embed_tokens"]}, {"model.embed_tokens.weight"}),
    "biases of the base": (
        {"model_type": "qwen2"},
        {"target_modules": ATTENTION},
        layers(*(f"self_attn.{p}" for p in ATTENTION)),
    ),
    "lora_bias": (
        {"model_type": "qwen2"},
        {"target_modules": ["q_proj"], "lora_bias": True},
        layers("self_attn.q_proj") | {f"model.layers.{index}.self_attn.q_proj.bias" for index in range(2)},
    ),
    "trained biases": (
        {"model_type": "qwen2"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        layers("self_attn.q_proj") | {f"model.layers.{index}.self_attn.q_proj.bias" for index in range(2)},
    ),
    "fused layers": ({"model_type": "phi3"}, {"target_modules": ["qkv_proj"]}, layers("self_attn.qkv_proj")),
    "beside experts": ({"model_type": "mixtral"}, {"target_modules": ["q_proj"]}, layers("self_attn.q_proj")),
    "whole modules": (
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        layers("self_attn.q_proj", "input_layernorm", "post_attention_layernorm")
        | {"lm_head.weight", "model.norm.weight"},
    ),
    "embedding and head": (
        {},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"lm_head.weight", "model.embed_tokens.weight"},
    ),
    "tokens": (
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 300]},
        layers("self_attn.q_proj") | {"model.embed_tokens.weight"},
    ),
    "Conv1D": (
        {"model_type": "gpt2"},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {
            f"transformer.h.{index}.{part}.weight"
            for index in range(2)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_base_and_adapter(case, base, tmp_path):
    model, options, touched = CASES[case]
    folder = base(**({} if model.get("model_type") == "gpt2" else {"max_shard_size": "200KB"}) | model)
    adapter = make_adapter(folder, tmp_path / "adapter", **options)
    output = merge_adapter(folder, adapter, tmp_path / "merged", progress=False)
    assert_merged(output, peft_model(folder, adapter))
    assert changed(folder, output) == touched
    files = sorted(file.name for file in Path(folder).glob("*.safetensors*"))
    assert files == sorted(file.name for file in output.glob("*.safetensors*"))
    if len(files) > 1:
        index, before = (json.loads((Path(f) / "model.safetensors.index.json").read_text()) for f in (output, folder))
        assert index["weight_map"] == before["weight_map"]
        assert index["metadata"]["total_size"] == before["metadata"]["total_size"]
    config = {name: json.loads((Path(f) / "config.json").read_text()) for name, f in (("is", output), ("was", folder))}
    assert config["is"] == config["was"]


TIED = {
    "elsewhere": ({"target_modules": ["q_proj"]}, True),
    "rows of both": ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 300]}, True),
    "rows of the head": ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 300]}}, False),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "whole embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "whole, both alike": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "LoRA of the head": ({"target_modules": ["lm_head"]}, False),
    "LoRA of the embedding": ({"target_modules": ["embed_tokens"]}, False),
    "LoRA, both alike": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "LoRA, both unlike": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
}


def tie_matrices(tensors: dict[str, torch.Tensor]) -> None:
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    tensors[f"{head}.lora_A.weight"] = tensors[f"{embedding}.lora_embedding_B"].t().contiguous()
    tensors[f"{head}.lora_B.weight"] = tensors[f"{embedding}.lora_embedding_A"].t().contiguous()


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_stay_tied_unless_the_adapter_parts_them(case, base, tmp_path):
    options, stays = TIED[case]
    folder = base("gemma3_text", tie=True, max_shard_size="200KB")
    adapter = make_adapter(folder, tmp_path / "adapter", **options)
    if case == "LoRA, both alike":  # as PEFT initialises them; from then on, it trains two pairs
        edit_tensors(tie_matrices)(Path(adapter))
    output = merge_adapter(folder, adapter, tmp_path / "merged", progress=False)
    assert_merged(output, peft_model(folder, adapter))
    assert ("lm_head.weight" in tensors_of(output)) != stays
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == stays


@pytest.mark.parametrize("stored", ["both", "head"])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_tied_weights_that_are_stored_otherwise(stored, part, base, tmp_path):
    """Some checkpoints hold both of two tied weights, or one under the name of the head."""
    folder = tmp_path / "base"
    shutil.copytree(base(tie=True), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base(tie=True), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[part])
    output = merge_adapter(str(folder), adapter, tmp_path / "merged", progress=False)
    assert_merged(output, peft_model(base(tie=True), adapter))
    adapter = make_adapter(base(tie=True), tmp_path / "other", target_modules=["q_proj"], trainable_token_indices=[9])
    output = merge_adapter(str(folder), adapter, tmp_path / "tied", progress=False)
    assert_merged(output, peft_model(base(tie=True), adapter))
    assert set(tensors_of(output)) == set(tensors)


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 2), ("float32", 8)])
def test_another_dtype(dtype, factor, base, tmp_path):
    """In float32, the sum of r products rounds r times, and not only its result once."""
    adapter = make_adapter(base(), tmp_path / "adapter")
    output = merge_adapter(base(), adapter, tmp_path / "merged", dtype=dtype, progress=False)
    assert_merged(output, peft_model(base(), adapter), getattr(torch, dtype), factor)
    assert {tensor.dtype for tensor in tensors_of(output).values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == getattr(torch, dtype)


@torch.no_grad()
def round_to_4bit(folder: str, skip: tuple[str, ...] = ("lm_head",), device: str = "cpu", **kind) -> PreTrainedModel:
    """The base as QLoRA computes with it: each linear layer quantised and dequantised by bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if (isinstance(module, torch.nn.Linear) or conv) and not any(part in name for part in skip):
            weight = module.weight.t() if conv else module.weight
            codes, state = bnb_functional.quantize_4bit(weight.contiguous().to(device), blocksize=64, **kind)
            rounded = bnb_functional.dequantize_4bit(codes, state).cpu()
            module.weight.copy_(rounded.t() if conv else rounded)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, {"quant_type": "nf4", "compress_statistics": True}),
        ({"quant_type": "fp4", "double_quant": False}, {"quant_type": "fp4", "compress_statistics": False}),
    ],
)
def test_weights_that_were_trained_against(model_type, options, kind, base, tmp_path):
    """Also layers without an adapter were quantised; embedding, head and norms never were."""
    target = ["c_attn"] if model_type == "gpt2" else ["q_proj", "lm_head"]
    adapter = make_adapter(base(model_type), tmp_path / "adapter", target_modules=target)
    output = merge_adapter(base(model_type), adapter, tmp_path / "m", base_weights="trained", progress=False, **options)
    assert_merged(output, peft_model(round_to_4bit(base(model_type), **kind), adapter))
    kept = {name for name in tensors_of(base(model_type)) if name not in changed(base(model_type), output)}
    expected = {"wte", "wpe", "ln_", "bias"} if model_type == "gpt2" else {"embed_tokens", "norm"}
    assert kept == {name for name in tensors_of(base(model_type)) if any(part in name for part in expected)}


def test_modules_skipped_in_training_are_not_rounded(base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    skip = ["lm_head", "down_proj"]
    output = merge_adapter(base(), adapter, tmp_path / "m", base_weights="trained", skip_modules=skip, progress=False)
    rounded = round_to_4bit(base(), tuple(skip), quant_type="nf4", compress_statistics=True)
    assert_merged(output, peft_model(rounded, adapter))
    assert not any("down_proj" in name for name in changed(base(), output))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_4bit_output_is_the_merged_model_quantised_by_transformers(model_type, base, tmp_path):
    target = ["c_attn"] if model_type == "gpt2" else ["q_proj", "lm_head"]
    adapter = make_adapter(base(model_type), tmp_path / "adapter", target_modules=target)
    wide = merge_adapter(base(model_type), adapter, tmp_path / "wide", progress=False)
    small = merge_adapter(base(model_type), adapter, tmp_path / "small", save_4bit=True, progress=False)
    expected = AutoModelForCausalLM.from_pretrained(wide, quantization_config=NF4, dtype=torch.bfloat16)
    expected.save_pretrained(tmp_path / "expected")
    loaded = AutoModelForCausalLM.from_pretrained(small)
    assert loaded.config.quantization_config.bnb_4bit_use_double_quant is True
    for model in (loaded, expected):
        model.train()  # in evaluation, bitsandbytes re-orders its codes on some CPUs
    assert torch.equal(loaded(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    ours, theirs = tensors_of(small), tensors_of(tmp_path / "expected")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if ".quant_state." in name:
            assert json.loads(bytes(tensor.numpy())) == json.loads(bytes(theirs[name].numpy()))
        else:
            assert same_bytes(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def quantized_base(base, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quantized")
    AutoModelForCausalLM.from_pretrained(base(), quantization_config=NF4, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def test_base_in_4_bits_is_merged_onto_its_own_bytes(base, quantized_base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    output = merge_adapter(quantized_base, adapter, tmp_path / "merged", base_weights="trained", progress=False)
    rounded = round_to_4bit(base(), quant_type="nf4", compress_statistics=True)
    assert_merged(output, peft_model(rounded, adapter))
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert set(tensors_of(output)) == set(tensors_of(base()))
    small = merge_adapter(
        quantized_base, adapter, tmp_path / "small", base_weights="trained", save_4bit=True, progress=False
    )
    touched = {name for name in changed(quantized_base, small) if not name.endswith(("quant_map", "quant_state"))}
    assert touched and all("q_proj" in name for name in touched)
    wide = AutoModelForCausalLM.from_pretrained(output, quantization_config=NF4, dtype=torch.bfloat16)
    expected = wide.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(tensors_of(small)["model.layers.1.self_attn.q_proj.weight"], expected.data)
    AutoModelForCausalLM.from_pretrained(small)


def test_base_in_4_bits_has_no_original_weights(base, quantized_base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"base_weights='original'.*stored in 4 bits.*base_weights='trained'"):
        merge_adapter(quantized_base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"use_dora": True, "use_rslora": True}])
@pytest.mark.parametrize("base_weights", ["original", "trained"])
def test_on_a_gpu(options, base_weights, base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", **options)
    output = merge_adapter(
        base(), adapter, tmp_path / "merged", base_weights=base_weights, device="cuda", progress=False
    )
    rounded = round_to_4bit(base(), device="cuda", quant_type="nf4", compress_statistics=True)
    assert_merged(output, peft_model(base() if base_weights == "original" else rounded, adapter))
    small = merge_adapter(base(), adapter, tmp_path / "small", save_4bit=True, device="cuda", progress=False)
    expected = merge_adapter(base(), adapter, tmp_path / "wide", device="cuda", progress=False)
    loaded, quantized = (
        AutoModelForCausalLM.from_pretrained(
            folder, device_map="cuda", dtype=torch.bfloat16, **({"quantization_config": config} if config else {})
        )
        for folder, config in ((small, None), (expected, NF4))
    )
    assert torch.equal(loaded(input_ids=IDS.cuda()).logits, quantized(input_ids=IDS.cuda()).logits)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.track(made)
        return made

    def track(self, made: object) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))


@pytest.mark.parametrize(("options", "copies"), [({}, 2), ({"base_weights": "trained"}, 3), ({"save_4bit": True}, 3)])
def test_memory_is_that_of_one_tensor(options, copies, base, tmp_path, monkeypatch):
    """As stored and as written; when quantising, once more in between. All else is small."""
    adapter = make_adapter(base(), tmp_path / "adapter")
    monkeypatch.setattr(lora_math, "_BLOCK_BYTES", 1 << 12)
    live, read = LiveBytes(), Weights.read

    def tracked_read(weights: Weights, name: str) -> torch.Tensor:
        tensor = read(weights, name)
        live.track(tensor)
        return tensor

    monkeypatch.setattr(Weights, "read", tracked_read)
    with live:
        merge_adapter(base(), adapter, tmp_path / "merged", progress=False, **options)
    weights = Weights(find_weights(base()))
    largest = max(tensor.num_bytes for tensor in weights.tensors.values())
    matrices = 2 * 4 * 4 * (512 + 128)  # A and B in float32, as stored and on the device
    assert largest <= live.peak <= copies * largest + matrices + 4 * (1 << 12)
    assert live.peak < weights.num_bytes / 2


def test_process_stays_small(tmp_path):
    """The whole process grows by far less than the one file that the model is in."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    (tmp_path / "base").mkdir()
    config.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    row = torch.randn(1024 * 2816, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ShardWriter(tmp_path / "base" / "model.safetensors", [*names]) as writer:
        for name, tensor in names.items():
            if name != "lm_head.weight":
                writer.add(name, row[: tensor.numel()].view(tensor.shape))
    adapter = {}
    for index in range(6):
        for part, rows in (("mlp.up_proj", 2816), ("self_attn.q_proj", 1024)):
            adapter[f"base_model.model.model.layers.{index}.{part}.lora_A.weight"] = torch.ones(4, 1024)
            adapter[f"base_model.model.model.layers.{index}.{part}.lora_B.weight"] = torch.ones(rows, 4)
    LoraConfig(r=4, target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path / "adapter")
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    program = """
        import resource, sys
        from pathlib import Path
        import torch
        from hf_qlora_fsdp import merge_adapter
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        folder = Path(sys.argv[1])
        merge_adapter(sys.argv[2], sys.argv[3], folder / "warm", progress=False)  # all that is imported late
        before = peak()
        merge_adapter(folder / "base", folder / "adapter", folder / "merged", progress=False)
        print("grown by", peak() - before)
    """
    tiny = make_checkpoint(tmp_path / "tiny")
    warm = make_adapter(tiny, tmp_path / "tiny adapter")
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), tiny, warm]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    num_bytes = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert num_bytes > 140 << 20
    # One up_proj is 5.5 MiB: as stored, as written, in blocks of 16 MiB with their sum and rounding.
    assert int(done.stdout.split("grown by")[1]) < 64 << 20


KILLED = """
    import os, signal, sys
    from hf_qlora_fsdp import merge_adapter
    from hf_qlora_fsdp.merging.shards import ShardWriter
    add = ShardWriter.add
    def add_or_die(writer, name, tensor):
        add(writer, name, tensor)
        if "-00003-" in writer.path.name:
            os.kill(os.getpid(), signal.SIGKILL)
    ShardWriter.add = add_or_die
    merge_adapter(*sys.argv[1:], progress=False)
"""


def test_killed_merge_goes_on_where_it_was(base, tmp_path):
    folder = base(max_shard_size="200KB")
    adapter = make_adapter(folder, tmp_path / "adapter")
    whole = merge_adapter(folder, adapter, tmp_path / "whole", progress=False)
    output = tmp_path / "killed"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), folder, adapter, str(output)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -9
    finished = [f"model-0000{number}-of-00005.safetensors" for number in (1, 2)]
    assert sorted(file.name for file in output.glob("*.safetensors")) == finished
    assert not (output / "config.json").exists()
    times = [(output / name).stat().st_mtime_ns for name in finished]
    for other, what in (
        ({"dtype": "float16"}, "another options"),
        ({"adapter": make_adapter(folder, tmp_path / "other", seed=2)}, "another adapter"),
        ({"base": base(seed=3, max_shard_size="200KB")}, "another base"),
    ):
        arguments = {"base": folder, "adapter": adapter, "output": output, **other}
        with pytest.raises(ValueError, match=rf"{what} .*not mix.*new folder"):
            merge_adapter(**arguments, progress=False)
    merge_adapter(folder, adapter, output, progress=False)
    assert [(output / name).stat().st_mtime_ns for name in finished] == times
    assert {f.name: f.read_bytes() for f in output.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_file_that_was_cut_short_since_is_merged_again(base, tmp_path):
    folder = base(max_shard_size="200KB")
    output = merge_adapter(folder, make_adapter(folder, tmp_path / "adapter"), tmp_path / "merged", progress=False)
    file = output / "model-00002-of-00005.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    merge_adapter(folder, str(tmp_path / "adapter"), output, progress=False)
    assert file.read_bytes() == content


@pytest.mark.parametrize("occupied", ["file.txt", "config.json"])
def test_folder_of_somebody_else_is_refused(occupied, base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    output = tmp_path / "output"
    output.mkdir()
    (output / occupied).write_text("{}")
    with pytest.raises(ValueError, match=r"not empty.*two models would mix.*new folder"):
        merge_adapter(base(), adapter, output)
    assert os.listdir(output) == [occupied]
    with pytest.raises(ValueError, match="is a file"):
        merge_adapter(base(), adapter, output / occupied)


def test_tokenizer_and_templates_come_from_the_adapter_if_it_has_them(base, tmp_path):
    adapter = Path(make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"]))
    first = merge_adapter(base(), str(adapter), tmp_path / "first", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (first / name).read_bytes() == (Path(base()) / name).read_bytes()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<json>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    second = merge_adapter(base(), str(adapter), tmp_path / "second", progress=False)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (second / name).read_bytes() == (adapter / name).read_bytes() != (Path(base()) / name).read_bytes()


def test_base_in_the_cache_of_the_hub(base, tmp_path):
    cache_as_hub_would(Path(base()), tmp_path / "hub")
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    output = merge_adapter("org/name", adapter, tmp_path / "merged", progress=False, cache_dir=str(tmp_path / "hub"))
    assert_merged(output, peft_model(base(), adapter))
    assert (output / "tokenizer.json").exists()


def edit_config(**fields) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


def pickle_it(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def put_aside(adapter: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(adapter, adapter.parent / "aside" / name)
    shutil.rmtree(adapter)
    (adapter.parent / "aside").rename(adapter)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = {
    "another method": (edit_config(peft_type="IA3"), r"type 'IA3'.*only LoRA.*merge_and_unload"),
    "QA-LoRA": (edit_config(use_qalora=True), "use_qalora.*pools its input.*unmerged"),
    "aLoRA": (edit_config(alora_invocation_tokens=[1]), "alora_invocation_tokens.*tokens of the input.*unmerged"),
    "replicated layers": (edit_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication.*another config"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa'.*changed the base.*conversion"),
    "option of the future": (edit_config(use_magic=True), r"does not know: \['use_magic'\].*Update peft"),
    "another rank": (edit_config(r=8), r"lora_B.* \[128, 4\].*\[128, 8\]|lora_A.*\[4, 128\].*\[8, 128\]"),
    "no magnitudes": (edit_config(use_dora=True), "use_dora=True, but its tensors"),
    "half a pair": (
        edit_tensors(lambda tensors: tensors.pop(f"{Q0}.lora_B.weight")),
        "one of the two matrices is missing",
    ),
    "no tensors": (edit_tensors(dict.clear), "holds no tensors.*earlier checkpoint"),
    "a foreign module": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.model.conv.lora_A.weight": torch.ones(4, 4)})),
        "model.conv.lora_A.weight' .*no parameter of LlamaForCausalLM",
    ),
    "a resized vocabulary": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(520, 128)})),
        r"\[520, 128\].*\[512, 128\].*resize_token_embeddings",
    ),
    "a shard of one rank": (
        edit_tensors(lambda tensors: tensors.update({f"{Q0}.lora_B.weight": torch.ones(64, 4)})),
        r"\[64, 4\].*\[128, 4\].*saved in pieces",
    ),
    "a pickle": (pickle_it, r"no adapter_model.safetensors.*\.bin.*pickle can run code"),
    "several": (put_aside, r"2 in folders: \['one', 'two'\].*one can be merged at a time"),
    "nothing": (lambda adapter: (adapter / "adapter_config.json").unlink(), "no adapter_config.json.*no PEFT adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(case, base, tmp_path):
    damage, message = REFUSED[case]
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    damage(Path(adapter))
    with pytest.raises(ValueError, match=message):
        merge_adapter(base(), adapter, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_weights": "best"}, "base_weights='best'.*original.*trained"),
        ({"dtype": "int8"}, "dtype='int8'.*bfloat16"),
    ],
)
def test_options_that_do_not_exist(options, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        merge_adapter(base(), "adapter", tmp_path / "merged", **options)


def test_merged_weights_that_are_not_finite_are_not_written(base, tmp_path):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    edit_tensors(lambda tensors: tensors[f"{Q0}.lora_B.weight"].fill_(1e6))(Path(adapter))
    merge_adapter(base(), adapter, tmp_path / "fits", progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*not finite in torch.float16"):
        merge_adapter(base(), adapter, tmp_path / "merged", dtype="float16", progress=False)
    assert os.listdir(tmp_path / "merged") == ["merge.json"]


def test_help_quotes_the_measured_figures():
    with (ROOT / "benchmarks" / "merge.csv").open(newline="") as stream:
        rows = {row["claim"]: row for row in csv.DictReader(stream)}  # the latest of each claim
    lines = {line.split()[0]: line.split() for line in WHICH_BASE.splitlines() if " +- " in line}
    assert set(lines) == {"original", "trained"}
    for base_weights, words in lines.items():
        names = ("loss", "loss above that of the trained model", "standard error of that")
        names += ("how far a token's log-probability is from the trained model's", "accuracy")
        figures = [rows[f"merged onto {base_weights}: {name}"]["value"] for name in names]
        assert [word for word in words[1:] if word != "+-"] == figures
    row = rows["trained: 4-bit base and adapter: loss"]
    accuracy = rows["trained: 4-bit base and adapter: accuracy"]["value"]
    assert f"own loss is {row['value']}, and {accuracy} of its answers" in WHICH_BASE and row["date"] in WHICH_BASE
    assert all(package.partition("==")[2].partition("+")[0] in WHICH_BASE for package in row["versions"].split())


def test_command_line(base, tmp_path, capsys):
    adapter = make_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    arguments = ["merge", base(), adapter, str(tmp_path / "merged"), "--base-weights", "trained", "--dtype", "float32"]
    quantization = ["--quant-type", "fp4", "--no-double-quant", "--skip-modules", "lm_head", "up_proj"]
    assert main([*arguments, *quantization, "--compute-dtype", "float16"]) == 0
    printed = capsys.readouterr()
    assert "from_pretrained" in printed.out and "Merging: 100%" in printed.err
    written = merge_adapter(
        base(),
        adapter,
        tmp_path / "same",
        base_weights="trained",
        dtype="float32",
        quant_type="fp4",
        double_quant=False,
        skip_modules=["lm_head", "up_proj"],
        compute_dtype="float16",
        progress=False,
    )
    assert (written / "merge.json").read_bytes() == (tmp_path / "merged" / "merge.json").read_bytes()
    assert not changed(str(written), tmp_path / "merged")
    assert main(["merge", base(), str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 2
    assert "nowhere' is no folder" in capsys.readouterr().err

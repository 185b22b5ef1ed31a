"""Experts are streamed from every form of checkpoint to the same bytes, with one expert in memory at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BitsAndBytesConfig

from hf_qlora_fsdp.experts.layers import PROJECTIONS, Experts4bit, fused_experts
from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.loading.adapters import check_peft_config, inject_adapter
from hf_qlora_fsdp.loading.blueprint import build_quantized_meta_model
from hf_qlora_fsdp.loading.random_weights import draw_weights
from hf_qlora_fsdp.loading.sources import Piece, Slot, plan_checkpoint
from hf_qlora_fsdp.loading.weights import Weights, find_weights
from hf_qlora_fsdp.sharding_policy import ShardingPolicy
from hf_qlora_fsdp.speed.matmul_share import count_multiplications
from hf_qlora_fsdp.summary import count_parameters
from tests.distributed import RankPool
from tests.experts.test_experts import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    PeakMemory,
    make_moe,
    pack_and_dequantize,
    tokens,
)

MODEL_TYPES = ["mixtral", "qwen3_moe", "gpt_oss"]


def build(folder: Path, **quantization: Any) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_use_double_quant": True} | quantization)
    return build_quantized_meta_model(str(folder), config, torch.float32, hub={})


def expert_pieces(model: Any, pieces: list[Piece]) -> dict[str, tuple[Piece, Slot]]:
    found = {}
    for piece in pieces:
        path, _, leaf = piece.targets[0].rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Experts4bit) and leaf in PROJECTIONS:
            found[piece.targets[0]] = (piece, Slot(getattr(module, leaf), module, leaf))
    assert len(found) == 2 * len(PROJECTIONS)
    return found


def write_fused(folder: Path, model: Any) -> None:
    model.config.save_pretrained(folder)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def quantize_stored(folder: Path, *others: str, **options: Any) -> None:
    """Store the experts' matrices as bitsandbytes did when each was a linear layer, and so others by their names."""
    tensors, file = {}, folder / "model.safetensors"
    for name, tensor in load_file(file).items():
        if not any(part in name for part in (".experts.", *others)):
            tensors[name] = tensor
            continue
        codes, state = bnb_functional.quantize_4bit(tensor, quant_type="nf4", **options)
        tensors |= {name: codes} | {f"{name}.{role}": part for role, part in state.as_dict(packed=True).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("form", ["mixtral", "qwen3_moe", "gpt_oss", "mixtral fused", "mixtral in 4 bits"])
def test_every_form_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    model = make_moe(form.partition(" ")[0])
    if form == "mixtral fused":
        write_fused(tmp_path, model)
    else:
        model.save_pretrained(tmp_path)
    if form == "mixtral in 4 bits":
        quantize_stored(tmp_path, compress_statistics=True)
    expected = pack_and_dequantize(model)
    built = build(tmp_path, bnb_4bit_quant_type="nf4")
    weights = Weights(find_weights(str(tmp_path)))
    for name, (piece, slot) in expert_pieces(built, plan_checkpoint(built, weights, torch.float32).pieces).items():
        before = weights.bytes_read
        with PeakMemory() as memory:
            made = piece.make({name: slot}, torch.device("cpu"))[name]
        assert torch.equal(made.view(torch.uint8), expected.get_parameter(name).view(torch.uint8))
        assert weights.bytes_read - before == piece.num_bytes
        if "fused" not in form and form != "gpt_oss":  # slices are cut from a mapping of the file, which is no memory
            assert memory.peak <= made.nbytes + piece.transient_bytes
        one_expert = 4 * slot.module.shapes[slot.leaf][1] * slot.module.shapes[slot.leaf][2]
        assert piece.transient_bytes <= 3 * one_expert


def test_drawn_experts_do_not_depend_on_the_rank_that_draws(tmp_path: Path) -> None:
    make_moe("gpt_oss").save_pretrained(tmp_path)
    built = build(tmp_path, bnb_4bit_quant_type="nf4")
    for name, (piece, slot) in expert_pieces(built, draw_weights(built, torch.float32).pieces).items():
        made = piece.make({name: slot}, torch.device("cpu"))[name]
        slot.module.set_packed(slot.leaf, made)
        experts = slot.module.dequantize(slot.leaf)
        assert 0.015 < experts.std() < 0.025
        assert not torch.equal(experts[0], experts[1])
        again = piece.make({name: slot}, torch.device("cpu"))[name]
        assert torch.equal(made.view(torch.uint8), again.view(torch.uint8))


def test_experts_quantised_in_another_way_are_refused(tmp_path: Path) -> None:
    make_moe("mixtral").save_pretrained(tmp_path)
    quantize_stored(tmp_path, compress_statistics=False)
    built = build(tmp_path, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight.*double_quant=False.*16-bit checkpoint"):
        plan_checkpoint(built, Weights(find_weights(str(tmp_path))), torch.float32)


def test_experts_quantised_as_one_tensor_are_refused(tmp_path: Path) -> None:
    write_fused(tmp_path, make_moe("mixtral"))
    quantize_stored(tmp_path, compress_statistics=True)
    built = build(tmp_path, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.\w+_proj' is stored in 4 bits.*16-bit checkpoint"):
        plan_checkpoint(built, Weights(find_weights(str(tmp_path))), torch.float32)


def test_a_router_that_is_stored_in_4_bits_is_in_16(tmp_path: Path) -> None:
    """It was a linear layer when bitsandbytes stored it, and is none in transformers 5."""
    model = make_moe("mixtral")
    model.save_pretrained(tmp_path)
    quantize_stored(tmp_path, ".gate.", compress_statistics=True)
    built = build(tmp_path, bnb_4bit_quant_type="nf4")
    router, name = built.model.layers[1].mlp.gate, "model.layers.1.mlp.gate.weight"
    plan = plan_checkpoint(built, Weights(find_weights(str(tmp_path))), torch.float32)
    (piece,) = (piece for piece in plan.pieces if name in piece.targets)
    made = piece.make({name: Slot(router.weight, router, "weight")}, torch.device("cpu"))[name]
    given = model.model.layers[1].mlp.gate.weight
    codes, state = bnb_functional.quantize_4bit(given, quant_type="nf4", compress_statistics=True)
    assert torch.equal(made, bnb_functional.dequantize_4bit(codes, state)) and not torch.equal(made, given)


def test_experts_without_a_third_dimension_are_refused_by_name(tmp_path: Path) -> None:
    """Those of DBRX lie one above the other in matrices that are no linear layers, which bitsandbytes leaves alone."""
    sizes = {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    config = AutoConfig.for_model("dbrx", d_model=HIDDEN, n_layers=2, ffn_config=sizes, attn_config=attention)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DbrxExpertGLU.*\['v1', 'w1', 'w2'\].*1\.1 MiB in 16 bits"):
        build(tmp_path)


def test_experts_may_be_left_in_16_bits(tmp_path: Path) -> None:
    make_moe("mixtral").save_pretrained(tmp_path)
    built = build(tmp_path, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp.experts"])
    assert [name for name, _ in fused_experts(built)] == ["model.layers.0.mlp.experts"]
    assert isinstance(built.model.layers[1].mlp.experts, Experts4bit)


def test_experts_are_counted(tmp_path: Path) -> None:
    make_moe("mixtral", top_k=2).save_pretrained(tmp_path)
    model = inject_adapter(
        build(tmp_path), LoraConfig(r=4, target_parameters=[f"mlp.experts.{p}" for p in PROJECTIONS])
    )
    attention, experts = 2 * (2 * 128 * 128 + 2 * 64 * 128), 2 * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE
    lora = 2 * NUM_EXPERTS * 4 * ((HIDDEN + 2 * INTERMEDIATE) + (INTERMEDIATE + HIDDEN))
    counts = count_parameters(model)
    assert (counts["4bit"], counts["trained"]) == (attention + experts, lora)
    passed = count_multiplications(model.get_base_model())
    # A token passes two of the eight experts, and their LoRA.
    assert (passed.frozen, passed.trained) == (attention + experts // 4, lora // 4)


# ---- What is adapted -------------------------------------------------------------------------------------------------


def adapted(tmp_path: Path, model_type: str, **options: Any) -> set[str]:
    make_moe(model_type).save_pretrained(tmp_path)
    model = inject_adapter(build(tmp_path), LoraConfig(**{"r": 4} | options))
    return {name.partition("layers.0.")[2] for name, p in model.named_parameters() if p.requires_grad} - {""}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_linear_means_experts_too(tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.experts", "mlp.experts.base_layer"]
    expected = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    assert adapted(tmp_path, model_type, target_modules="all-linear") == expected
    names = "mlp.experts, self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj"
    assert f"LoRA on {names}, each expert's included. Routers stay as they are.\n" in caplog.text


def test_dense_layers_that_peft_leaves_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the experts have the rank that was asked for, of which PEFT makes twice as much where it confuses both."""
    make_moe("qwen3_moe", mlp_only_layers=[0]).save_pretrained(tmp_path)
    model = inject_adapter(build(tmp_path), LoraConfig(r=4, target_modules="all-linear"))
    assert "and so do mlp.down_proj, mlp.gate_proj, mlp.up_proj, which PEFT cannot tell from experts." in caplog.text
    experts: Any = model.base_model.model.model.layers[1].mlp.experts
    assert (experts.r, experts.base_layer.r) == ({"default": 4}, {"default": 4})


def test_a_router_that_is_a_linear_layer_stays_in_16_bits_and_frozen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_moe("afmoe", num_dense_layers=1).save_pretrained(tmp_path)
    built = build(tmp_path)
    assert type(built.model.layers[1].mlp.router.gate) is torch.nn.Linear
    assert type(built.model.layers[1].mlp.shared_experts.up_proj) is not torch.nn.Linear
    assert type(built.lm_head) is torch.nn.Linear
    model = inject_adapter(built, LoraConfig(r=4, target_modules="all-linear"))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "router" in name]
    assert "router" not in caplog.text


def test_modules_that_are_excluded_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    excluded = ["o_proj", "layers.0.mlp.experts"]
    make_moe("mixtral").save_pretrained(tmp_path)
    model = inject_adapter(build(tmp_path), LoraConfig(r=4, target_modules="all-linear", exclude_modules=excluded))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition("layers.")[2][0] for name in trained if "experts" in name} == {"1"}
    assert not [name for name in trained if "o_proj" in name]
    assert "Routers stay as they are; exclude_modules=" in caplog.text
    every = build(tmp_path)
    inject_adapter(every, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["experts"]))
    assert not [name for name, p in every.named_parameters() if p.requires_grad and "experts" in name]


@pytest.mark.parametrize(("model_type", "said"), [("gpt_oss", True), ("qwen3_moe", False)])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_modules_that_are_not_there_are_named(
    tmp_path: Path, model_type: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT knows what the experts of a Qwen were called; those of gpt-oss never were layers."""
    found = adapted(tmp_path, model_type, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert said == ("target_modules has down_proj, gate_proj, up_proj, of which GptOssForCausalLM has" in caplog.text)
    assert said == ("mlp.experts.lora_A.default.weight" not in found)


def test_attention_alone_and_a_router_that_is_asked_for(tmp_path: Path) -> None:
    found = adapted(tmp_path, "mixtral", target_modules=["q_proj"], modules_to_save=["gate"])
    attention = {f"self_attn.q_proj.lora_{part}.default.weight" for part in "AB"}
    assert found == attention | {"mlp.gate.modules_to_save.default.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "all-linear", "lora_dropout": 0.1}, "lora_dropout=0.1.*no dropout.*name the modules"),
        ({"target_parameters": ["mlp.gate.weight"]}, "adapts 'weight' of .*mlp.gate.*modules_to_save for a router"),
        ({"target_modules": ["experts"]}, r"\{'experts'\}.*they are parameters.*target_parameters="),
        ({"target_modules": "all-linear", "use_dora": True}, "use_dora=True.*Leave use_dora out.*attention alone"),
        ({"target_modules": ["w1", "w2", "w3"], "lora_dropout": 0.1}, "lora_dropout=0.1.*attention alone"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, r"mlp.experts' whole.*in 4 bits.*LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}, r"k_proj' whole.*in 4 bits.*LoRA"),
        (
            {"target_parameters": ["mlp.experts.down_proj"], "layers_to_transform": [0]},
            r"layers_to_transform.*all layers.*layers\.0\.mlp",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_what_experts_do_not_take_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_peft_config(LoraConfig(r=4, **options))
        adapted(tmp_path, "mixtral", **options)


# ---- Two ranks -------------------------------------------------------------------------------------------------------


def load_and_run(rank: int, folders: dict[str, str], cache: str) -> dict[str, tuple[torch.Tensor, int]]:
    found = {}
    for model_type, folder in folders.items():
        lora = LoraConfig(r=4, target_modules="all-linear")
        policy = ShardingPolicy(param_dtype=torch.float32)
        model, again = (
            load_quantized_model(
                folder,
                peft_config=copy.deepcopy(lora),
                policy=policy,
                progress=False,
                expert_chunk_bytes=3 << 20,
                shard_cache_dir=cache,
            )
            for _ in range(2)
        )
        assert {m.chunk_bytes for m in model.modules() if isinstance(m, Experts4bit)} == {3 << 20}
        with torch.no_grad():
            logits = model(input_ids=tokens(6)).logits
            assert (model.load_report.from_cache, again.load_report.from_cache) == (False, True)
            assert torch.equal(again(input_ids=tokens(6)).logits, logits)
        found[model_type] = (logits, model.load_report.bytes_read)
    return found


def test_loaded_over_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """From the checkpoint, and then from the shard cache."""
    folders, expected = {}, {}
    for model_type in MODEL_TYPES:
        model = make_moe(model_type, implementation="grouped_mm")
        folders[model_type] = str(tmp_path / model_type)
        model.save_pretrained(folders[model_type])
        pack_and_dequantize(model)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                codes, state = bnb_functional.quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.data = bnb_functional.dequantize_4bit(codes, state)
        expected[model_type] = model(tokens(6)).logits
    results = ranks.run(load_and_run, folders, str(tmp_path / "cache"))
    for model_type, logits in expected.items():
        for found in results:
            torch.testing.assert_close(found[model_type][0], logits)
        # Two ranks read everything once, and about as much as each other.
        sizes = [found[model_type][1] for found in results]
        assert sum(sizes) == Weights(find_weights(folders[model_type])).num_bytes
        assert max(sizes) < 0.7 * sum(sizes)

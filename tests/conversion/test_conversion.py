"""A file of another program becomes the same run, key by key, or says where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_qlora_fsdp.cli import main
from hf_qlora_fsdp.conversion import _OURS, accelerate, axolotl_keys, convert, find_program, llama_factory_keys
from hf_qlora_fsdp.conversion.accelerate import read_accelerate
from hf_qlora_fsdp.conversion.axolotl import read_axolotl
from hf_qlora_fsdp.conversion.axolotl_data import SPEAKERS
from hf_qlora_fsdp.conversion.llama_factory import read_llama_factory
from hf_qlora_fsdp.conversion.yaml_files import load_yaml
from hf_qlora_fsdp.train.alpaca import to_messages, to_prompt_completion
from hf_qlora_fsdp.train.sharegpt import ROLES
from hf_qlora_fsdp.train.sharegpt import to_messages as read_sharegpt

# The public examples of Axolotl 0.18 (commit 067b021c) that fit their model, of LLaMA-Factory and of accelerate, in our
# own words; each file says in a second document what it means.
FILES = sorted((Path(__file__).parent / "files").glob("*.yaml"))
ROW = {"path": "some/rows", "type": "alpaca"}
AXOLOTL: dict[str, Any] = {
    "base_model": "some/model",
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "learning_rate": 1e-4,
    "datasets": [ROW],
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "quantization_bit": 4,
    "dataset": "some/rows",
    "dataset_dir": "ONLINE",
}
ACCELERATE: dict[str, Any] = {"distributed_type": "FSDP", "mixed_precision": "bf16"}


def tables_of(module: Any) -> list[dict[str, Any]]:
    return [getattr(module, name) for name in ("RENAMED", "UNUSED", "REFUSED", "HARMLESS") if hasattr(module, name)]


PROGRAMS = {
    "axolotl": (read_axolotl, AXOLOTL, *tables_of(axolotl_keys)),
    "llama-factory": (read_llama_factory, LLAMA_FACTORY, *tables_of(llama_factory_keys)),
    "accelerate": (read_accelerate, ACCELERATE, {}, *tables_of(accelerate)),
}


@pytest.fixture
def write(tmp_path):
    def write_file(text: object, name: str = "file.yml") -> str:
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return str(path)

    return write_file


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Be in a folder with `data/dataset_info.json`, and return a function that puts an entry into it."""
    info = {name: {"file_name": f"{name}.json"} for name in ("identity", "alpaca_en_demo")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def add(**entries: object) -> None:
        info.update(entries)  # type: ignore[arg-type]
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))

    add()
    return add


def split_documents(path: Path) -> tuple[str, dict[str, object]]:
    file, meaning = path.read_text().split("\n---\n")
    return file, yaml.safe_load(meaning)


def assert_three_parts(error: BaseException, *words: str) -> None:
    message = str(error)
    given, rest = message.split(" That cannot work: ")
    assert "You gave " in given and len(rest.split(". ", 1)) == 2, message
    for word in words:
        assert word in message


# --- Whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_public_file_becomes_the_same_run(path, write, data):
    file, meaning = split_documents(path)
    conversion = convert(write(file))
    assert conversion.arguments == meaning
    assert conversion.program.lower().replace(" ", "-") == path.stem[: len(conversion.program)]
    text = conversion.to_yaml()
    assert yaml.safe_load(text) == meaning
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert all(note in comments for note in conversion.notes)


def test_every_name_exists():
    """The tables name fields without importing the classes that have them."""
    from hf_qlora_fsdp.train.arguments import ALL

    known = {item.name for kind in ALL for item in fields(kind)}
    for table in (axolotl_keys, llama_factory_keys):
        assert {name for name, _ in table.RENAMED.values()} | set(table.DEFAULTS) <= known
    for _, _, difference in CHANGES:
        assert difference.keys() <= known


@pytest.fixture
def group_of_one():
    """Leave no process group behind, nor the variables that founding one sets."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


# TRL's field of that name, until its version 2, which setup.cfg excludes.
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_train_reads_what_is_written(write, data, group_of_one, tmp_path):
    from trl.scripts.utils import DatasetConfig

    from hf_qlora_fsdp.config import QLoRAFSDPConfig
    from hf_qlora_fsdp.train.command_line import read_request

    on_a_cpu = {"use_cpu": True, "tf32": None, "output_dir": str(tmp_path)}
    for path in FILES:
        file, meaning = split_documents(path)
        ours = write(convert(write(file)).to_yaml(), "ours.yaml")
        rest = ["--model_name_or_path", "a/model", "--dataset_name", "a/dataset"] if "accelerate" in path.stem else []
        request = read_request(["--config", ours, *rest])
        config = QLoRAFSDPConfig(**request.training | on_a_cpu)
        read = {**asdict(request.data), **asdict(request.mixture), **asdict(request.model), **request.training}
        for name, value in meaning.items():
            if name == "datasets":
                assert read[name] == [asdict(DatasetConfig(**entry)) for entry in value]
            elif name == "lora_target_modules" and len(value) == 1:
                assert read[name] == value[0]  # TRL makes text of a list of one
            else:
                assert read[name] == value
            if name in request.training and name != "report_to":  # of which transformers makes a list of callbacks
                assert getattr(config, name) == on_a_cpu.get(name, value)


# --- Key by key ------------------------------------------------------------------------------------------------------

# What the smallest files mean: the defaults of their programs, where those are not ours.
SMALLEST: dict[str, dict[str, Any]] = {
    "axolotl": {
        "model_name_or_path": "some/model",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "datasets": [{"path": "some/rows", "split": "train"}],
        "dataset_format": "alpaca",
        "completion_only_loss": True,
        "max_length": 512,
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "save_strategy": "epoch",
        "save_total_limit": 4,
        "eval_strategy": "no",
        "output_dir": "./model-out",
    },
    "llama-factory": {
        "model_name_or_path": "some/model",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "datasets": [{"path": "some/rows", "split": "train", "columns": ["instruction", "input", "output"]}],
        "dataset_format": "alpaca_chat",
        "completion_only_loss": True,
        "max_length": 2048,
        "bf16": True,
        "gradient_checkpointing": True,
        "learning_rate": 5e-5,
    },
    "accelerate": {"bf16": True},
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_not_said_is_that_programs_default(program):
    read, smallest, *_ = PROGRAMS[program]
    assert read(smallest)[0] == SMALLEST[program]


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"}},
        {"wandb_name": "first"},
        {"eval_strategy": "epoch"},
        {"evaluation_strategy": "steps"},
        {"eval_steps": 5},
        {"evals_per_epoch": 2},
        {"tf32": "auto"},
        {"bf16": "full"},
        {"selective_checkpointing": True},
        {"plugins": ["axolotl.integrations.lm_eval.LMEvalPlugin"]},
        {"model_config": {"output_router_logits": True}},
        {"optimizer": "adamw_hf"},
        {"gradient_checkpointing": True, "activation_offloading": "legacy_disk"},
        {"chat_template": "llama3"},
        {"wandb_project": "mine"},
    ],
    ids=" ".join,
)
def test_what_is_read_and_not_used_is_said(changes):
    key, value = list(changes.items())[-1]
    if isinstance(value, dict):
        key, value = next((f"{key}.{name}", inner) for name, inner in value.items())
    value = value[0] if isinstance(value, list) else value
    _, notes = read_axolotl({**AXOLOTL, **changes})
    assert any(f"{key}: {value!r} is not used: " in note for note in notes)


def test_a_dtype_that_is_declined_and_taken_is_said():
    declined = read_llama_factory({**LLAMA_FACTORY, "bf16": False})
    assert declined[0] == read_llama_factory(LLAMA_FACTORY)[0]
    assert any(note.startswith("bf16: False is not used: ") for note in declined[1])
    assert not any(note.startswith("bf16") for note in read_llama_factory({**LLAMA_FACTORY, "bf16": True})[1])


def test_what_fsdp_settles_is_said():
    _, notes = read_axolotl({**AXOLOTL, "fsdp_config": {"fsdp_use_orig_params": False, "limit_all_gathers": True}})
    assert [note for note in notes if "fsdp" in note] == [
        "fsdp_config['use_orig_params']=False has no effect: FSDP2 shards each parameter by itself and never replaces "
        "it by a flat one."
    ]


GONE = object()
# What is added to the smallest file, and what differs then.
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl", changes, difference)
    for changes, difference in [
        ({"adapter": "lora"}, {}),
        ({"load_in_4bit": "true"}, {}),
        ({"peft_init_lora_weights": True, "peft_autocast_adapter_dtype": True}, {}),
        (
            {"lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]},
            {"lora_target_modules": ["q_proj", "v_proj"]},
        ),
        # TRL makes text of a list of one, and to PEFT text is a pattern for the whole name.
        ({"lora_target_linear": False, "lora_target_modules": "q_proj"}, {"lora_target_modules": [r"(.*\.)?q_proj"]}),
        ({"lora_target_modules": ["q_proj", "up_proj"]}, {}),
        (
            {"lora_target_linear": False, "lora_target_parameters": "mlp.experts.down_proj"},
            {"lora_target_modules": GONE, "lora_target_parameters": ["mlp.experts.down_proj"]},
        ),
        ({"lora_modules_to_save": ["lm_head"]}, {"lora_modules_to_save": ["lm_head"]}),
        ({"peft_use_dora": True}, {"use_dora": True}),
        (
            {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
                "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}},
            {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        ),
        ({"fsdp": ["full_shard", "auto_wrap", "offload"]}, {"reshard_after_forward": True, "cpu_offload": True}),
        (
            {"fsdp_config": {"offload_params": True, "cpu_offload_pin_memory": False}, "fsdp_version": 2},
            {"cpu_offload": True, "cpu_offload_pin_memory": False},
        ),
        ({"fsdp_version": 1, "fsdp_final_state_dict_type": "FULL_STATE_DICT"}, {}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": True, "activation_offloading": True}),
        (
            {"gradient_checkpointing": True, "activation_offloading": "disk"},
            {"gradient_checkpointing": True, "activation_offloading": True},
        ),
        ({"gradient_checkpointing": True, "selective_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"bf16": True}, {}),
        ({"bf16": "full"}, {}),
        ({"bf16": False}, {"bf16": False}),
        ({"bf16": False, "bfloat16": True}, {}),
        ({"fp16": True}, {"bf16": GONE, "fp16": True}),
        ({"float16": True, "bf16": False}, {"bf16": GONE, "fp16": True}),
        ({"tf32": True}, {"tf32": True}),
        ({"tf32": "auto"}, {}),
        ({"flash_attention": True}, {"attn_implementation": "flash_attention_2"}),
        ({"sdp_attention": True}, {"attn_implementation": "sdpa"}),
        ({"flex_attention": True}, {"attn_implementation": "flex_attention"}),
        ({"eager_attention": True}, {"attn_implementation": "eager"}),
        (
            {"attn_implementation": "kernels-community/flash-attn2"},
            {"attn_implementation": "kernels-community/flash-attn2"},
        ),
        ({"model_config": {"output_router_logits": True}}, {}),
        ({"overrides_of_model_config": {"output_router_logits": False}}, {"router_aux_loss_coef": 0.0}),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, {}),
        ({"special_tokens": {"eos_token": "<|eot|>", "bos_token": None}}, {"eos_token": "<|eot|>"}),
        ({"micro_batch_size": 2, "eval_batch_size": 3}, {
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}),
        ({"micro_batch_size": 0}, {"per_device_train_batch_size": 0, "per_device_eval_batch_size": 0}),
        ({"gradient_accumulation_steps": 0}, {"gradient_accumulation_steps": 0}),
        ({"micro_batch_size": 2, "batch_size": 8}, {
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 4}),
        ({"gradient_accumulation_steps": 2, "batch_size": 8}, {
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"sample_packing": True, "shuffle_merged_datasets": False}, {"packing": True, "shuffle_dataset": False}),
        ({"optimizer": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"optimizer": "sgd", "optim_args": {"momentum": 0.9}}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
        ({"lr_scheduler": "constant"}, {"lr_scheduler_type": "constant"}),
        ({"cosine_min_lr_ratio": 0.1}, {
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2}}, {
            "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}),
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({"warmup_ratio": "5e-2"}, {"warmup_steps": 0.05}),
        ({"save_steps": 50}, {"save_strategy": "steps", "save_steps": 50}),
        ({"saves_per_epoch": 2, "num_epochs": 4}, {
            "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 0.125}),
        ({"save_strategy": False}, {"save_strategy": "no"}),
        ({"eval_steps": 50}, {}),
        ({"val_set_size": 100, "eval_steps": 50}, {
            "test_split_size": 100, "eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True}),
        ({"val_set_size": 0.1, "evals_per_epoch": 1}, {
            "test_split_size": 0.1, "eval_strategy": "epoch", "eval_on_start": True}),
        ({"val_set_size": 0.1, "eval_strategy": "epoch"}, {
            "test_split_size": 0.1, "eval_strategy": "epoch", "eval_on_start": True}),
        ({"excess_length_strategy": "truncate"}, {}),
        ({"train_on_inputs": True}, {"completion_only_loss": False}),
        ({"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, {}),  # no conversations, so no template
        ({"hub_model_id": "me/mine"}, {
            "push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True, "hub_always_push": True}),
        ({"wandb_project": "mine", "wandb_name": "first"}, {"report_to": ["wandb"], "run_name": "first"}),
        ({"use_wandb": True, "use_tensorboard": True}, {"report_to": ["wandb", "tensorboard"]}),
        ({"use_mlflow": True, "mlflow_run_name": "first"}, {"report_to": ["mlflow"], "run_name": "first"}),
        ({"use_comet": True}, {"report_to": ["comet_ml"]}),
        ({"use_swanlab": True}, {"report_to": ["swanlab"]}),
        ({"use_trackio": True, "trackio_run_name": "first"}, {"report_to": ["trackio"], "run_name": "first"}),
    ]
] + [
    ("llama-factory", changes, difference)
    for changes, difference in [
        ({"stage": "sft", "finetuning_type": "lora", "quantization_method": "bnb"}, {}),
        ({"quantization_type": "fp4"}, {"bnb_4bit_quant_type": "fp4"}),
        ({"lora_target": "q_proj, v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"lora_target": "q_proj"}, {"lora_target_modules": [r"(.*\.)?q_proj"]}),
        ({"lora_rank": 4}, {"lora_r": 4, "lora_alpha": 8}),
        ({"lora_alpha": 64}, {"lora_alpha": 64}),
        ({"additional_target": "embed_tokens,lm_head"}, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
        ({"flash_attn": "auto"}, {}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"bf16": True}, {}),
        ({"fp16": True}, {"fp16": True, "bf16": GONE}),
        ({"fsdp": "full_shard offload"}, {"cpu_offload": True, "reshard_after_forward": True}),
        ({"fsdp_config": {"offload_params": True}}, {"cpu_offload": True}),
        ({"neat_packing": True, "packing": True}, {"packing": True}),
        ({"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 20}, {
            "test_split_size": 0.1, "eval_strategy": "steps", "eval_steps": 20}),
        ({"evaluation_strategy": False}, {"eval_strategy": "no"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"template": "llama3", "enable_thinking": True}, {}),
        ({"train_on_prompt": True}, {"completion_only_loss": False}),
        ({"max_samples": 10}, {"datasets": [
            {"path": "some/rows", "columns": ["instruction", "input", "output"], "split": "train[:10]"}]}),
    ]
] + [
    ("accelerate", {"use_cpu": True}, {"use_cpu": True}),
    ("accelerate", {"mixed_precision": "fp16"}, {"fp16": True, "bf16": GONE}),
    ("accelerate", {"mixed_precision": "no"}, {"bf16": GONE}),
    ("accelerate", {"distributed_type": "MULTI_GPU"}, {}),
    ("accelerate", {"fsdp_config": {"fsdp_offload_params": True}}, {"cpu_offload": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "changes", "difference"),
    CHANGES,
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_key_changes_what_it_means_and_nothing_else(program, changes, difference):
    read, smallest, *_ = PROGRAMS[program]
    expected = {**read(smallest)[0], **difference}
    assert read({**smallest, **changes})[0] == {name: value for name, value in expected.items() if value is not GONE}


# What is added to the smallest file, and what the error says.
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("axolotl", changes, words)
    for changes, words in [
        ({"adapter": None}, "adapter: qlora"),
        ({"load_in_4bit": False}, "load_in_4bit: true"),
        ({"adapter": None, "lora_r": None}, "adapter: qlora"),
        ({"peft_autocast_adapter_dtype": False}, "float32"),
        ({"peft_init_lora_weights": "pissa"}, "pissa"),
        ({"lora_target_linear": False}, "lora_target_modules"),
        ({"lora_target_modules": ["lm_head"]}, "lora_target_linear"),
        ({"bnb_config_kwargs": {"llm_int8_threshold": 6}}, "bnb_config_kwargs.llm_int8_threshold"),
        ({"fsdp_config": {"offload_parms": True}}, "'offload_params'"),
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "SIZE_BASED_WRAP"),
        ({"fp16": True, "bf16": True}, "fp16"),
        ({"bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float32"}}, "bfloat16"),
        ({"flash_attention": True, "attn_implementation": "sdpa"}, "another key asks for 'sdpa'"),
        ({"xformers_attention": True}, "'xformers'"),
        ({"sage_attention": True}, "'sage'"),
        ({"attn_implementation": "flash"}, "flash_attention_2"),
        ({"model_config": {"rope_theta": 1}}, "model_config.rope_theta"),
        ({"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]}, "spectrum"),
        ({"special_tokens": {"bos_token": "<s>"}}, "special_tokens.bos_token"),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 2, "batch_size": 6}, "batch_size"),
        ({"shuffle_merged_datasets": False}, "random order"),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer: 'paged_adamw_8bit'"),
        ({"optimizer": "adafactor"}, "adafactor"),
        ({"optimizer": "muon"}, "muon"),
        ({"lr_scheduler": "rex"}, "rex"),
        ({"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}, "cosine_min_lr_ratio"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"warmup_ratio": 10}, "share"),
        ({"save_steps": 5, "saves_per_epoch": 1}, "saves_per_epoch"),
        ({"save_strategy": "often"}, "often"),
        ({"save_strategy": "no", "saves_per_epoch": 2}, "saves_per_epoch"),
        ({"val_set_size": 9, "eval_strategy": "epoch", "eval_steps": 2}, "eval_steps"),
        ({"val_set_size": 0.1, "evaluation_strategy": "no"}, "val_set_size"),
        ({"learning_rate": "quick"}, "a number"),
        ({"lora_r": 1.5}, "a whole number"),
        ({"sample_packing": "perhaps"}, "neither on nor off"),
        ({"fsdp_config": ["offload_params"]}, "a mapping"),
        ({"excess_length_strategy": "drop"}, "truncate"),
        ({"base_model": None}, "base_model"),
        ({"dataset_processes": 2, "dataset_num_proc": 3}, "dataset_num_proc=3"),
        ({"datasets": []}, "datasets"),
        ({"datasets": ["some/rows"]}, "each of them is a mapping"),
        ({"datasets": [{"path": "some/rows"}]}, "datasets[0].type"),
        ({"datasets": [{"type": "alpaca"}]}, "datasets[0].path"),
        ({"datasets": [{**ROW, "type": "input_output"}]}, "input_output"),
        ({"datasets": [{**ROW, "type": "alpacca"}]}, "'alpaca'"),
        ({"datasets": [{**ROW, "typ": "alpaca"}]}, "'type'"),
        ({"datasets": [ROW, {**ROW, "type": "completion"}]}, "one form"),
        ({"base_modle": "some/model"}, "'base_model'"),
    ]
] + [
    ("axolotl", {"datasets": [{"path": "some/rows", "type": "chat_template", **changes}]}, words)
    for changes, words in [
        ({"field_messages": "turns"}, "turns"),
        ({"message_property_mappings": {"role": "who"}}, "who"),
        ({"message_property_mappings": {"weight": "weight"}}, "weight"),
        ({"message_field_content": "words"}, "words"),
        ({"roles": {"assistant": ["gpt", "narrator"]}}, "narrator"),
        ({"roles": {"expert": ["gpt"]}}, "expert"),
        ({"roles": ["user"]}, "a mapping"),
        ({"roles_to_train": ["assistant", "user"]}, "roles_to_train"),
        ({"roles_to_train": []}, "roles_to_train"),
        ({"train_on_eos": "last"}, "train_on_eos"),
        ({"chat_template": "chatml"}, "chat_template_jinja"),
        ({"chat_template_jinja": "{{ messages }}"}, "template.jinja"),
    ]
] + [
    ("llama-factory", changes, words)
    for changes, words in [
        ({"stage": "dpo"}, "stage: sft"),
        ({"finetuning_type": "full"}, "finetuning_type: lora"),
        ({"quantization_bit": None}, "quantization_bit: 4"),
        ({"quantization_method": "hqq"}, "hqq"),
        ({"flash_attn": "fa4"}, "fa3"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"packing": True}, "neat_packing"),
        ({"val_size": 0.1}, "eval_strategy"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio"),
        ({"template": "default"}, "template"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"dataset_dir": "nowhere"}, "dataset_info.json"),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes"),
        ({"dataset": None}, "dataset"),
        ({"lora_rnak": 4}, "'lora_rank'"),
    ]
] + [
    ("accelerate", {"distributed_type": "DEEPSPEED"}, "FSDP2"),
    ("accelerate", {"mixed_precision": "fp8"}, "fp8"),
    ("accelerate", {"fsdp_config": {"fsdp_ofload_params": True}}, "'offload_params'"),
    ("accelerate", {"num_proceses": 2}, "'num_processes'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "changes", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_what_cannot_be_honoured_is_refused(program, changes, words):
    read, smallest, *_ = PROGRAMS[program]
    with pytest.raises(ValueError) as error:
        read({**smallest, **changes})
    assert_three_parts(error.value, words)


@pytest.mark.parametrize("program", PROGRAMS)
def test_tables_hold_what_they_say(program):
    """A key becomes what it is called here, or changes nothing and is named, or is an error, and harmless when off."""
    read, smallest, renamed, unused, refused, harmless = PROGRAMS[program]
    arguments, notes = read(smallest)
    samples = {float: 0.5, int: 7, bool: True, str: "x", list: ["x"], dict: {"x": 1}}
    for key, (ours, kind) in renamed.items():
        assert read({**smallest, key: samples[kind]})[0][ours] == samples[kind]
    for key, why in unused.items():
        told = read({**smallest, key: "x"})
        assert told[0] == arguments
        assert f"{key}: 'x' is not used: {why}." in told[1]
        assert read({**smallest, key: None}) == (arguments, notes)
    for key in refused:
        with pytest.raises(ValueError) as error:
            read({**smallest, key: "x"})
        assert_three_parts(error.value, f"{key}: 'x'")
        for off in (None, False, 0, "", [], harmless.get(key)):
            assert read({**smallest, key: off}) == (arguments, notes)


def test_no_program_has_a_key_by_which_a_file_is_known_for_ours():
    assert not [key for key in _OURS if find_program(key)]
    assert (find_program("base_model"), find_program("colour")) == ("Axolotl", None)


def test_every_key_has_one_fate_and_those_that_are_read_are_tested():
    for table, program in ((axolotl_keys, "axolotl"), (llama_factory_keys, "llama-factory")):
        fates = [table.RENAMED, table.UNUSED, table.REFUSED, table.READ]
        assert all(one.keys().isdisjoint(other) for one, other in combinations(fates, 2))
        assert table.HARMLESS.keys() <= table.REFUSED.keys()
        tested = {key for name, changes, _ in (*CHANGES, *REFUSALS) if name == program for key in changes}
        file = {
            key for path in FILES if path.stem.startswith(program) for key in yaml.safe_load(split_documents(path)[0])
        }
        assert table.READ.keys() <= tested | file


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "dataset", "form"),
    [
        (ROW, {"path": "some/rows"}, {"dataset_format": "alpaca", "completion_only_loss": True}),
        ({**ROW, "name": "en", "split": "train[:9]"}, {"path": "some/rows", "name": "en", "split": "train[:9]"}, {}),
        ({**ROW, "path": "rows.jsonl", "ds_type": "json"}, {"path": "rows.jsonl"}, {}),
        ({**ROW, "path": "without_ending", "ds_type": "json"}, {"path": "json", "data_files": "without_ending"}, {}),
        ({**ROW, "ds_type": "json"}, {"path": "some/rows"}, {}),
        (
            {**ROW, "ds_type": "json", "data_files": ["a.jsonl", "b.jsonl"]},
            {"path": "some/rows", "data_files": ["a.jsonl", "b.jsonl"]},
            {},
        ),
        ({**ROW, "data_files": "a.jsonl"}, {"path": "some/rows", "data_files": "a.jsonl"}, {}),
        (
            {"path": "some/rows", "type": "completion", "field": "body"},
            {"path": "some/rows"},
            {"dataset_text_field": "body", "dataset_format": None},
        ),
        (
            {"path": "some/rows", "type": "chat_template", "roles_to_train": ["assistant"], "train_on_eos": "turn"},
            {"path": "some/rows"},
            {"assistant_only_loss": True, "dataset_format": None, "completion_only_loss": None},
        ),
        (
            {
                "path": "some/rows",
                "type": "chat_template",
                "message_field_role": "from",
                "message_field_content": "value",
            },
            {"path": "some/rows"},
            {"assistant_only_loss": True, "dataset_format": "sharegpt"},
        ),
        (
            {"path": "some/rows", "type": "chat_template", "roles": {"user": ["user"], "assistant": ["assistant"]}},
            {"path": "some/rows"},
            {"assistant_only_loss": True, "dataset_format": None},
        ),
        (
            {"path": "some/rows", "type": "chat_template", "roles": {"user": ["human", "user"], "assistant": "gpt"}},
            {"path": "some/rows"},
            {"assistant_only_loss": True, "dataset_format": "sharegpt"},
        ),
        (
            {"path": "some/rows", "type": "chat_template", "chat_template_jinja": "mine.jinja"},
            {"path": "some/rows"},
            {"chat_template_path": "mine.jinja"},
        ),
    ],
)
def test_a_dataset_of_axolotl(entry, dataset, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "without_ending").write_text("[]")
    arguments, _ = read_axolotl({**AXOLOTL, "datasets": [entry]})
    assert arguments["datasets"] == [{"split": "train", **dataset}]
    assert {name: arguments.get(name) for name in form} == form


def test_all_that_is_said_of_a_dataset_is_taken():
    fates = [axolotl_keys.READ_OF_DATASET, axolotl_keys.UNUSED_OF_DATASET, axolotl_keys.REFUSED_OF_DATASET]
    assert all(one.keys().isdisjoint(other) for one, other in combinations(fates, 2))
    for key in axolotl_keys.READ_OF_DATASET.keys() - {"path", "type", "split", "name", "ds_type", "data_files"}:
        _, notes = read_axolotl({**AXOLOTL, "datasets": [{**ROW, key: "x"}]})
        assert any(note.startswith(("datasets[0].chat_template:", f"datasets[0].{key}:")) for note in notes)
    for key in axolotl_keys.UNUSED_OF_DATASET:
        assert f"datasets[0].{key}: 2" in " ".join(read_axolotl({**AXOLOTL, "datasets": [{**ROW, key: 2}]})[1])
    for key in axolotl_keys.REFUSED_OF_DATASET:
        with pytest.raises(ValueError) as error:
            read_axolotl({**AXOLOTL, "datasets": [{**ROW, key: "x"}]})
        assert_three_parts(error.value, f"datasets[0].{key}: 'x'")


def test_rows_that_go_on_in_the_next_sequence_do_so():
    text = {"datasets": [{"path": "some/rows", "type": "completion"}], "sample_packing": True}
    assert read_axolotl({**AXOLOTL, **text})[0]["packing_strategy"] == "bfd_split"
    assert not any("longer than" in note for note in read_axolotl({**AXOLOTL, **text})[1])
    assert any("longer than" in note for note in read_axolotl(AXOLOTL)[1])


def test_datasets_of_llama_factory(data):
    chat = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    data(
        hub={"hf_hub_url": "some/rows", "ms_hub_url": "other/rows", "subset": "en", "split": "test", "num_samples": 5},
        shared={"file_name": "turns.json", "formatting": "sharegpt"},
        chat={"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": chat},
        pictures={"file_name": "mm.json", "formatting": "sharegpt", "columns": {"images": "images"}},
        preferences={"file_name": "pairs.json", "ranking": True},
        history={
            "file_name": "h.json",
            "columns": {"prompt": "instruction", "response": "output", "history": "history"},
        },
    )

    def read(names: str, **more: object) -> dict[str, Any]:
        return read_llama_factory({**LLAMA_FACTORY, "dataset_dir": "data", "dataset": names, **more})[0]

    columns = ["instruction", "input", "output"]
    hub = {"path": "some/rows", "name": "en", "columns": columns}
    assert read("hub")["datasets"] == [hub | {"split": "test[:5]"}]
    assert read("hub", max_samples=3)["datasets"] == [hub | {"split": "test[:3]"}]
    shared = read("shared")
    assert shared["datasets"] == [{"path": "data/turns.json", "columns": ["conversations"], "split": "train"}]
    assert (shared["dataset_format"], shared["assistant_only_loss"]) == ("sharegpt", True)
    assert "dataset_format" not in read("chat") and read("chat")["assistant_only_loss"]
    for names, words in {
        "identity,shared": "one form",
        "pictures": "images",
        "preferences": "ranking",
        "history": "history",
        "identiti": "'identity'",
    }.items():
        with pytest.raises(ValueError) as error:
            read(names)
        assert_three_parts(error.value, words)


def test_alpaca_in_its_own_words():
    row = {"instruction": "Name {it}.", "input": "", "output": "Blue."}
    assert to_prompt_completion(row) == {
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName {it}.\n\n### Response:\n",
        "completion": "Blue.",
    }
    assert to_prompt_completion({**row, "input": "The sky."}) == {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName {it}.\n\n### Input:\nThe sky.\n\n### Response:\n",
        "completion": "Blue.",
    }
    del row["input"]
    assert to_prompt_completion(row) == to_prompt_completion({**row, "input": None})


def test_alpaca_as_a_conversation():
    row = {"instruction": "Name it.", "input": "The sky.", "output": "Blue.", "system": "Be brief."}
    said = {"role": "user", "content": "Name it.\nThe sky."}
    answer = [{"role": "assistant", "content": "Blue."}]
    assert to_messages(row) == {"prompt": [{"role": "system", "content": "Be brief."}, said], "completion": answer}
    alone = {"role": "user", "content": "Name it."}
    assert to_messages({"instruction": "Name it.", "output": "Blue."}) == {"prompt": [alone], "completion": answer}


def test_sharegpt():
    assert {name: role for role, names in SPEAKERS.items() for name in names} == ROLES
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
    ]
    assert read_sharegpt({"conversations": turns, "score": 5}) == {"messages": messages}
    assert read_sharegpt({"messages": messages}) == {"messages": messages}


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (to_prompt_completion, {"question": "Why?", "output": "So."}, "output, question"),
        (to_messages, {"instruction": "Say.", "output": None}, "instruction"),
        (read_sharegpt, {"text": "Hi"}, "text"),
        (read_sharegpt, {"conversations": [{"from": "narrator", "value": "Hi"}]}, "narrator"),
        (read_sharegpt, {"conversations": [{"from": "human", "value": None}]}, "human"),
    ],
)
def test_rows_of_another_form_are_refused(read, row, words):
    with pytest.raises(ValueError) as error:
        read(row)
    assert_three_parts(error.value, words)


def test_train_reads_rows_of_these_forms(write, data, tmp_path):
    from hf_qlora_fsdp.train.command import read_data
    from hf_qlora_fsdp.train.command_line import read_request

    rows = [{"instruction": f"Say {number}.", "input": "", "output": str(number), "text": "all"} for number in range(4)]
    (tmp_path / "data" / "identity.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = [{"path": "rows.jsonl", "type": "alpaca", "split": "train[:3]"}]
    evaluated = {"val_set_size": 1, "eval_steps": 1, "datasets": dataset}
    for file, expected in (
        ({**AXOLOTL, **evaluated}, [to_prompt_completion(row) for row in rows[:3]]),
        ({**LLAMA_FACTORY, "dataset_dir": "data", "dataset": "identity"}, [to_messages(row) for row in rows]),
    ):
        ours = write(convert(write(file)).to_yaml(), "ours.yaml")
        train, test = read_data(read_request(["--config", ours]))
        held_out = test.to_list() if test is not None else []
        assert len(held_out) == ("val_set_size" in file)
        assert sorted(train.to_list() + held_out, key=str) == sorted(expected, key=str)
    single = ["--model_name_or_path", "a/model", "--dataset_name", "rows.jsonl", "--eval_strategy", "epoch"]
    single += ["--eval_dataset_name", "data/identity.json", "--dataset_format", "alpaca"]
    train, test = read_data(read_request(single))
    assert train.to_list() == test.to_list() == [to_prompt_completion(row) for row in rows]


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("- base_model: a\n", "it is a list"),
        ("base_model: [\n", "cannot be read"),
        ("colour: blue\n", "none of its keys"),
        ("base_model: a\nlora_r: 8\nlora_r: 16\n", "'lora_r' is there twice"),
        ("datasets:\n- {path: a, path: b}\n", "'path' is there twice"),
        ("model_name_or_path: a\nuse_peft: true\n", "train --config"),
        ("model_name_or_path: a\ndataset_name: b\n", "train --config"),
    ],
)
def test_a_file_that_is_none(text, words, write, capsys):
    assert main(["convert", write(text)]) == 2
    assert_three_parts(ValueError(capsys.readouterr().err), words)


def test_a_key_may_be_repeated_with_the_same_value():
    text = "a: &shared {x: 1}\nb: {<<: *shared, x: 2}\na: {x: 1}\n"
    assert load_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 0}, "lora_r=0"),
        ({"micro_batch_size": -1}, "per_device_train_batch_size=-1"),
        ({"sequence_len": 0}, "max_length=0"),
        ({"num_epochs": -1}, "num_train_epochs=-1"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    ],
)
def test_numbers_that_no_run_can_have(changes, words, write, capsys):
    """They are refused here, and not by the run that the file was converted for."""
    assert main(["convert", write(AXOLOTL | changes)]) == 2
    assert_three_parts(ValueError(capsys.readouterr().err), words)


def test_a_file_that_is_missing(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nothing.yml")]) == 2
    assert_three_parts(ValueError(capsys.readouterr().err), "nothing.yml", "no such file")


def test_the_command_writes_what_it_prints_once(write, tmp_path, capsys):
    path, out = write(AXOLOTL), tmp_path / "ours.yaml"
    assert main(["convert", path]) == 0
    printed = capsys.readouterr().out
    assert printed == convert(path).to_yaml()
    assert main(["convert", path, "-o", str(out)]) == 0
    assert out.read_text() == printed
    assert f"train --config {out}" in capsys.readouterr().out
    assert main(["convert", path, "--output", str(out)]) == 2
    assert_three_parts(ValueError(capsys.readouterr().err), str(out))


def test_a_run_that_is_written_in_two_files(write, data):
    options = {"fsdp_offload_params": True}
    ours = write(LLAMA_FACTORY, "llama.yaml")
    theirs = write({**ACCELERATE, "num_processes": 2, "fsdp_config": options}, "accelerate.yaml")
    both = convert(ours, theirs)
    assert both.arguments == read_llama_factory(LLAMA_FACTORY)[0] | {"cpu_offload": True}
    assert set(both.notes) == {*convert(ours).notes, *convert(theirs).notes}
    assert "# llama.yaml and accelerate.yaml of LLaMA-Factory and accelerate, for" in both.to_yaml()
    write({**ACCELERATE, "mixed_precision": "bf16", "fsdp_config": {"offload_params": False}}, "accelerate.yaml")
    write({**LLAMA_FACTORY, "fsdp": "full_shard offload"}, "llama.yaml")
    with pytest.raises(ValueError) as error:
        convert(ours, theirs)
    assert_three_parts(error.value, "cpu_offload=True (llama.yaml) and False (accelerate.yaml)")


def test_a_place_that_cannot_be_written_to(write, tmp_path, capsys):
    for place in (tmp_path / "no" / "such.yaml", tmp_path):
        assert main(["convert", write(AXOLOTL), "-o", str(place)]) == 2
        assert_three_parts(ValueError(capsys.readouterr().err), str(place))


def test_converting_imports_no_torch(write):
    code = (
        "import sys; from hf_qlora_fsdp.cli import main; main(sys.argv[1:]); print({'torch', 'trl'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code, "convert", write(AXOLOTL)], capture_output=True, text=True)
    assert ran.stdout.endswith("set()\n"), ran.stderr

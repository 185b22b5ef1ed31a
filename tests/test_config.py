"""The config decides how a run goes, in whatever words it was told; nothing in the environment decides otherwise."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, StateDictType
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import ParallelMode
from trl import SFTConfig

from hf_qlora_fsdp import ranks
from hf_qlora_fsdp.config import QLoRAFSDPConfig
from hf_qlora_fsdp.inputs import read_model_options, read_policy
from hf_qlora_fsdp.settling import join_ranks

OWN_FIELDS = [name for name in QLoRAFSDPConfig.__annotations__ if name != "learning_rate"]
LAUNCHER = ("FSDP_", "ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


@pytest.fixture(autouse=True)
def group_of_one(monkeypatch):
    """Give each test an environment without a launcher and a process group of its own, and leave neither behind."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER):
            del os.environ[name]
    assert not dist.is_initialized()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def make(tmp_path):
    def make_config(**arguments) -> QLoRAFSDPConfig:
        return QLoRAFSDPConfig(**({"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | arguments))

    return make_config


@pytest.fixture
def lines(caplog):
    """Return the lines logged so far, without the one about the missing launcher."""
    caplog.set_level(logging.INFO, logger="hf_qlora_fsdp")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "hf_qlora_fsdp" and not record.getMessage().startswith("No launcher found")
    ]


def assert_refused(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert message.startswith("You gave ") and " That cannot work: " in message
    for word in words:
        assert word in message


# --- Own fields ------------------------------------------------------------------------------------------------------


def test_defaults_are_silent_and_qlora(make, lines):
    config = make()
    assert lines() == []
    assert config.learning_rate == 2e-4
    assert config.compute_dtype == config.storage_dtype == torch.bfloat16
    assert config.mp_policy() == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    assert type(config.offload_policy()) is OffloadPolicy
    assert config.gradient_checkpointing is True
    assert config.fsdp is True
    assert config.parallel_mode is ParallelMode.DISTRIBUTED  # what transformers asks for under FSDP
    assert (dist.get_world_size(), config.world_size, config.device.type) == (1, 1, "cpu")


def test_every_changed_default_is_listed():
    theirs = {item.name: item.default for item in dataclasses.fields(SFTConfig)}
    changed = {
        item.name
        for item in dataclasses.fields(QLoRAFSDPConfig)
        if item.name in theirs and item.default != theirs[item.name] and item.default is not dataclasses.MISSING
    }
    note = QLoRAFSDPConfig.__doc__.partition("[!NOTE]")[2]
    assert changed == {name for name in theirs if f"`{name}`:" in note} == {"learning_rate"}


def plugin_of(config: QLoRAFSDPConfig) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**config.fsdp_plugin_args)


@pytest.mark.parametrize(
    ("flags", "observe", "seen"),
    [
        (["--bnb_4bit_quant_type", "fp4"], lambda c: c.quantization_config().bnb_4bit_quant_type, "fp4"),
        (["--no_bnb_4bit_use_double_quant"], lambda c: c.quantization_config().bnb_4bit_use_double_quant, False),
        (["--param_dtype", "float32"], lambda c: c.quantization_config().bnb_4bit_quant_storage, torch.float32),
        (["--param_dtype", "float32"], lambda c: plugin_of(c).mixed_precision_policy.param_dtype, torch.float32),
        (
            ["--transformer_layer_cls_to_wrap", "A", "B"],
            lambda c: plugin_of(c).transformer_cls_names_to_wrap,
            ["A", "B"],
        ),
        (["--cpu_offload"], lambda c: plugin_of(c).cpu_offload, CPUOffloadPolicy(pin_memory=True)),
        (
            ["--cpu_offload", "true", "--cpu_offload_pin_memory", "false"],
            lambda c: plugin_of(c).cpu_offload,
            CPUOffloadPolicy(pin_memory=False),
        ),
        (["--expert_chunk", "1GiB"], lambda c: read_model_options(c, None).get("expert_chunk_bytes"), 1 << 30),
        (["--reshard_after_forward", "no"], lambda c: plugin_of(c).reshard_after_forward, False),
    ],
)
def test_command_line(tmp_path, flags, observe, seen):
    parser = HfArgumentParser(QLoRAFSDPConfig)
    base = ["--output_dir", str(tmp_path), "--use_cpu"]
    (default,) = parser.parse_args_into_dataclasses(base, look_for_args_file=False)
    (config,) = parser.parse_args_into_dataclasses(base + flags, look_for_args_file=False)
    assert observe(config) == seen
    assert observe(default) != seen


def test_every_own_field_has_help_that_argparse_can_print():
    text = HfArgumentParser(QLoRAFSDPConfig).format_help()
    for name in OWN_FIELDS:
        assert QLoRAFSDPConfig.__dataclass_fields__[name].metadata["help"]
        assert f"--{name}" in text


def test_words_for_switches(make):
    config = make(cpu_offload="true", cpu_offload_pin_memory="False", reshard_after_forward="0")
    assert config.offload_policy() == CPUOffloadPolicy(pin_memory=False)
    assert plugin_of(config).reshard_after_forward is False
    assert make(transformer_layer_cls_to_wrap="A,B").transformer_layer_cls_to_wrap == ["A", "B"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bnb_4bit_quant_type": "int4"},
        {"param_dtype": "bf16"},
        {"expert_chunk": "256"},
        {"cpu_offload": "flase"},
        {"transformer_layer_cls_to_wrap": 3},
        {"cpu_offload_pin_memory": False},
        {"optim": "paged_adamw_8bit"},
        {"torch_compile": True},
        {"bf16_full_eval": True},
        {"fsdp_config": {"offload_parms": True}},
    ],
)
def test_bad_values_are_refused_before_a_group_is_joined(make, arguments):
    with pytest.raises(ValueError) as error:
        make(**arguments)
    assert_refused(error, *arguments)
    assert not dist.is_initialized()


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
        ({"param_dtype": "bfloat16"}, torch.bfloat16),
        ({"param_dtype": "float32"}, torch.float32),
        ({"param_dtype": torch.float32}, torch.float32),
        ({"param_dtype": "float32", "bf16": False}, torch.float32),
    ],
)
def test_one_dtype_for_everything(make, monkeypatch, arguments, dtype):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # must not autocast a float32 run
    config = make(**arguments)
    quantization = config.quantization_config()
    assert plugin_of(config).mixed_precision_policy == MixedPrecisionPolicy(dtype, torch.float32, None)
    assert quantization.bnb_4bit_compute_dtype == quantization.bnb_4bit_quant_storage == dtype
    assert (config.bf16, config.fp16) == (dtype == torch.bfloat16, False)
    assert config.mixed_precision == ("bf16" if dtype == torch.bfloat16 else "no")


@pytest.mark.parametrize(
    "arguments",
    [
        {"param_dtype": "bfloat16", "fp16": True},
        {"param_dtype": "bfloat16", "bf16": False},
        {"param_dtype": "float16", "bf16": True},
        {"param_dtype": "float32", "bf16": True},
        {"param_dtype": "float32", "fp16": True},
    ],
)
def test_precisions_that_contradict_each_other(make, arguments):
    with pytest.raises(ValueError) as error:
        make(**arguments)
    assert_refused(error, *arguments, "alone")


@pytest.mark.parametrize("arguments", [{"fp16": True}, {"param_dtype": "float16"}])
def test_float16_needs_a_gpu(make, arguments):
    with pytest.raises(ValueError) as error:
        make(**arguments)
    assert_refused(error, "on a CPU", "bfloat16")


def test_param_dtype_alone_turns_fp16_training_on(make, monkeypatch):
    monkeypatch.setattr("hf_qlora_fsdp.config.choose_device_type", lambda config: "cpu")
    config = make(param_dtype="float16")
    assert (config.fp16, config.bf16, config.mixed_precision) == (True, False, "fp16")
    assert config.storage_dtype == config.mp_policy().param_dtype == torch.float16
    assert make(fp16=True).storage_dtype == torch.float16


def test_the_launchers_precision_does_not_win_over_the_script(make, monkeypatch, lines):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert make().mixed_precision == "bf16"
    assert lines() == [
        "ACCELERATE_MIXED_PRECISION=fp16 (from accelerate launch) has no effect: the script trains in bfloat16."
    ]


# --- What people bring along -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field", "value", "line"),
    [
        ({"fsdp": "full_shard auto_wrap offload"}, "cpu_offload", True, "is read as cpu_offload=True."),
        ({"fsdp": ["shard_grad_op"]}, "reshard_after_forward", False, "is read as reshard_after_forward=False."),
        ({"fsdp_config": {"fsdp_offload_params": "true"}}, "cpu_offload", True, "is read as cpu_offload=True."),
        (
            {"fsdp_config": '{"fsdp_transformer_layer_cls_to_wrap": "A"}'},
            "transformer_layer_cls_to_wrap",
            ["A"],
            "is read as transformer_layer_cls_to_wrap=['A'].",
        ),
        (
            {"fsdp_config": {"activation_checkpointing": True}, "gradient_checkpointing": False},
            "gradient_checkpointing",
            True,
            "acts once, inside each decoder layer.",
        ),
        ({"fsdp_config": {"activation_checkpointing": True}}, "gradient_checkpointing", True, "acts once"),
        ({"fsdp_config": {"version": 1}}, "cpu_offload", False, "fsdp_config['version']=1 has no effect"),
    ],
)
def test_translations_log_one_line_each(make, lines, arguments, field, value, line):
    config = make(**arguments)
    assert getattr(config, field) == value
    assert getattr(config, "activation_checkpointing", config.gradient_checkpointing) == config.gradient_checkpointing
    assert len(lines()) == 1 and line in lines()[0]
    assert plugin_of(config).fsdp_version == 2
    assert plugin_of(config).activation_checkpointing is False


def test_what_already_holds_is_silent(make, lines):
    make(fsdp="full_shard auto_wrap", fsdp_config={"reshard_after_forward": "true", "cpu_offload": False})
    assert lines() == []


def test_a_json_file(make, tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"fsdp_offload_params": True, "cpu_offload_pin_memory": "false"}))
    assert make(fsdp=True, fsdp_config=str(path)).offload_policy() == CPUOffloadPolicy(pin_memory=False)


def test_a_field_and_its_other_spelling_must_agree(make):
    assert make(cpu_offload=True, fsdp_config={"offload_params": True}).cpu_offload
    with pytest.raises(ValueError) as error:
        make(cpu_offload=True, fsdp_config={"offload_params": False})
    assert_refused(error, "cpu_offload=True", "fsdp_config['offload_params']=False", "Remove one")


def test_gradient_checkpointing_off_is_off_by_either_name(make, recwarn):
    names = {"gradient_checkpointing", "activation_checkpointing"} & {
        item.name for item in dataclasses.fields(SFTConfig)
    }
    for name in names:
        config = make(**{name: False})
        assert [getattr(config, other) for other in names] == [False] * len(names)
    assert not recwarn.list


def test_hostile_environment_has_no_say(make, monkeypatch, caplog):
    hostile = {
        "FSDP_VERSION": "1",
        "FSDP_BACKWARD_PREFETCH": "BACKWARD_POST",
        "FSDP_FORWARD_PREFETCH": "true",
        "FSDP_USE_ORIG_PARAMS": "false",
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_MIN_NUM_PARAMS": "100000000",
        "ACCELERATE_USE_FSDP": "true",
    }
    quiet = plugin_of(make())
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    config = make()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # before there is a plugin: the model loads earlier
    plugin = plugin_of(config)
    assert plugin == quiet
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT
    assert not [record for record in caplog.records if record.name.startswith("accelerate")]
    # Set between the config and the trainer, nothing reaches the plugin either.
    config = make(transformer_layer_cls_to_wrap=["A"])
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "B")
    plugin = plugin_of(config)
    assert type(plugin.cpu_offload) is OffloadPolicy
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is False
    assert plugin.transformer_cls_names_to_wrap == ["A"]


def test_the_launchers_wishes_fill_fields_at_their_default(make, monkeypatch, lines):
    for name, value in {
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }.items():
        monkeypatch.setenv(name, value)
    config = make(gradient_checkpointing=False)
    assert config.cpu_offload and config.gradient_checkpointing and not config.reshard_after_forward
    assert config.transformer_layer_cls_to_wrap == ["A", "B"]
    assert len(lines()) == 4
    assert make(transformer_layer_cls_to_wrap="C").transformer_layer_cls_to_wrap == ["C"]
    assert any("wins over FSDP_TRANSFORMER_CLS_TO_WRAP=A,B" in line for line in lines())


# --- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"param_dtype": "float32", "eos_token": "<|im_end|>", "hub_token": "x"}])
def test_dict_round_trip(make, lines, arguments):
    config = make(fsdp="offload", fsdp_config={"reshard_after_forward": False}, **arguments)
    told = len(lines())
    again = QLoRAFSDPConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.fsdp_plugin_args == config.fsdp_plugin_args
    assert again.eos_token == arguments.get("eos_token")
    assert again.hub_token is None  # a secret is not written, and its placeholder is no token
    assert len(lines()) == told


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies(make, make_copy):
    config = make(cpu_offload=True, cpu_offload_pin_memory=False, transformer_layer_cls_to_wrap=["A"])
    assert make_copy(config).to_dict() == config.to_dict()
    assert plugin_of(make_copy(config)) == plugin_of(config)


def test_replace(make):
    config = make(cpu_offload=True)
    assert type(dataclasses.replace(config, cpu_offload=False).offload_policy()) is OffloadPolicy


# --- The arguments of another trainer --------------------------------------------------------------------------------


def test_from_sft_config(tmp_path, lines):
    theirs = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        learning_rate=3e-5,
        hub_token="secret",
        eos_token="<|im_end|>",
        packing=True,
        lr_scheduler_type="constant",
        fsdp=True,
        fsdp_config={"cpu_offload": True, "transformer_layer_cls_to_wrap": "A"},
    )
    config = QLoRAFSDPConfig.from_training_args(theirs)
    own = {*OWN_FIELDS, "fsdp", "fsdp_config"}
    for item in dataclasses.fields(SFTConfig):
        if item.name not in own:
            assert getattr(config, item.name) == getattr(theirs, item.name), item.name
    assert config.hub_token == "secret"
    assert (config.cpu_offload, config.transformer_layer_cls_to_wrap) == (True, ["A"])
    assert len(lines()) == 1
    for word in ("SFTConfig is taken over", "cpu_offload=True", "learning_rate=3e-05"):
        assert word in lines()[0]


def test_from_training_arguments_keeps_what_they_say(tmp_path, lines):
    theirs = TrainingArguments(str(tmp_path), use_cpu=True)
    config = QLoRAFSDPConfig.from_training_args(theirs, reshard_after_forward=False)
    assert config.compute_dtype == torch.float32
    assert (config.learning_rate, config.gradient_checkpointing) == (theirs.learning_rate, False)
    assert config.reshard_after_forward is False
    for word in ("TrainingArguments is taken over", "float32", "learning_rate=5e-05", "gradient_checkpointing=False"):
        assert word in lines()[0]


def test_overrides_win(make, tmp_path):
    theirs = SFTConfig(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config={"cpu_offload": True})
    overrides = {"cpu_offload": False, "param_dtype": "float32", "gradient_checkpointing": False}
    config = QLoRAFSDPConfig.from_training_args(theirs, **overrides)
    assert {name: getattr(config, name) for name in overrides} == overrides
    assert config.bf16 is False
    again = QLoRAFSDPConfig.from_training_args(config, cpu_offload=True, gradient_checkpointing=True)
    assert (again.cpu_offload, again.gradient_checkpointing, again.param_dtype) == (True, True, "float32")


def test_ours_come_back_as_they_are(make):
    config = make()
    assert QLoRAFSDPConfig.from_training_args(config) is config


def test_fields_of_a_class_of_the_users_own_are_kept(tmp_path, lines):
    @dataclasses.dataclass
    class MyConfig(SFTConfig):
        experiment: str = "none"

    config = QLoRAFSDPConfig.from_training_args(MyConfig(str(tmp_path), use_cpu=True, experiment="seven"))
    assert config.experiment == "seven"
    assert "experiment, which nothing here reads" in lines()[0]


# --- Devices and processes -------------------------------------------------------------------------------------------


def test_without_a_gpu_the_cpu_trains_and_it_is_said(make, monkeypatch, lines):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert make(use_cpu=False).use_cpu
    assert lines() == ["No CUDA device found: training on the CPU."]


def test_other_accelerators_are_refused(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    with pytest.raises(ValueError, match=r"xpu devices and no CUDA.*use_cpu=True"):
        make(use_cpu=False)
    assert make(use_cpu=True).use_cpu


def test_the_group_of_a_gpu_run_serves_the_cpu_as_well(make, monkeypatch, lines):
    joined = []
    monkeypatch.setattr(ranks, "join_process_group", lambda device_type, *rest: joined.append(device_type))
    config = make()
    join_ranks(config, "cuda")
    assert config.ddp_backend == "cuda:nccl,cpu:gloo"
    join_ranks(config, "cpu")  # arguments that were written on another machine
    assert config.ddp_backend is None
    assert joined == ["cpu", "cuda", "cpu"]
    assert lines() == []


def test_the_group_waits_as_long_as_it_is_told(make, lines):
    make(ddp_timeout=60)
    assert dist.distributed_c10d._get_default_timeout("gloo").total_seconds() != 60
    assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 60
    assert lines() == []


def test_finer_options_of_offloading_imply_it(make):
    assert read_policy(make(cpu_offload_layers="8")).cpu_offload_layers == 8
    for options in ({"cpu_offload_layers": 8}, {"cpu_offload_dir": "shards"}):
        config = make(**options)
        assert config.cpu_offload and read_policy(config).cpu_offload
    assert not make(cpu_offload_trainable=True).cpu_offload
    policy = read_policy(make(cpu_offload_dir="shards", cpu_offload_keep_files=True, cpu_offload_trainable=True))
    assert (policy.cpu_offload_dir, policy.cpu_offload_keep_files) == (Path("shards"), True)
    assert policy.cpu_offload_trainable and not policy.pins_memory("cuda")


def test_replicated_layers_are_a_number_or_all(make):
    assert [read_policy(make(replicate_layers=given)).replicate_layers for given in ("8", 8, "all")] == [8, 8, "all"]


@pytest.mark.parametrize(
    "options",
    [
        {"replicate_layers": "most"},
        {"replicate_layers": 0},
        {"replicate_layers": True},
        {"replicate_layers": 2.7},
        {"replicate_layers": 2, "cpu_offload_layers": 2},
        {"replicate_layers": "all", "cpu_offload_trainable": True},
    ],
)
def test_replicated_layers_that_mean_nothing_are_refused(make, options):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert_refused(error, "replicate_layers=", "Write" if len(options) == 1 else "Leave one of the two out")


@pytest.mark.parametrize("options", [{"cpu_offload_layers": 0}, {"cpu_offload_keep_files": True}])
def test_offloading_that_means_nothing_is_refused(make, options):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert_refused(error, next(iter(options)), "Write" if "cpu_offload_layers" in options else "cpu_offload_dir=PATH")


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_layers": "some"},
        {"checkpoint_layers": -1},
        {"checkpoint_layers": 4, "gradient_checkpointing": False},
        {"checkpoint_layers": "auto", "activation_offloading": True},
        {"checkpoint_layers": "auto", "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
)
def test_checkpointing_that_contradicts_itself_is_refused(make, options):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert_refused(error, "checkpoint_layers", "Write" if len(options) == 1 else "Remove one")


def test_checkpoint_layers_comes_as_text_from_a_command_line(make):
    assert [make(checkpoint_layers=value).checkpoint_layers for value in ("12", 0, "auto", None)] == [
        12,
        0,
        "auto",
        None,
    ]


def test_training_on_the_host_needs_a_group_that_serves_it(make, monkeypatch, lines):
    monkeypatch.setattr("hf_qlora_fsdp.settling.get_backend_config", lambda: "cuda:nccl")
    assert make().cpu_offload is False
    assert lines() == []
    make(cpu_offload=True)  # nothing is reduced on the CPU
    assert lines() == []
    with pytest.raises(ValueError) as error:
        make(cpu_offload_trainable=True)
    assert_refused(error, "cuda:nccl", "cpu_offload_trainable=True", "init_process_group")


def test_the_number_of_threads_is_left_alone(make, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    make()  # accelerate would warn, which is an error here
    assert torch.get_num_threads() == before
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_second_trainer_gets_its_own_plugin(make, monkeypatch):
    """accelerate is made to believe in GPUs, because it hands no plugin to processes on a CPU."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU))

    def make_accelerator(config: QLoRAFSDPConfig) -> Accelerator:
        return Accelerator(mixed_precision=config.mixed_precision, fsdp_plugin=plugin_of(config))

    config = make()
    first = make_accelerator(config).state.fsdp_plugin
    assert type(first.cpu_offload) is OffloadPolicy
    config.cpu_offload = True
    assert make_accelerator(config).state.fsdp_plugin is first  # what happens to those who do not reset
    assert config.distributed_state.distributed_type == DistributedType.FSDP

    config.reset_accelerator_state()
    assert config.distributed_state.distributed_type == DistributedType.MULTI_GPU  # what TRL looks at to load
    second = make_accelerator(config).state
    assert second.fsdp_plugin.cpu_offload == CPUOffloadPolicy(pin_memory=True)
    assert second.fsdp_plugin.mixed_precision_policy == config.mp_policy()
    assert second.distributed_type == DistributedType.FSDP


LAUNCHED = """
import json, os, sys
from hf_qlora_fsdp.config import QLoRAFSDPConfig
from hf_qlora_fsdp.inputs import read_policy

config = QLoRAFSDPConfig(sys.argv[1], use_cpu=True)
import torch.distributed as dist

said = [None] * dist.get_world_size()
dist.all_gather_object(said, [dist.get_rank(), config.process_index, config.cpu_offload, config.reshard_after_forward,
                              config.transformer_layer_cls_to_wrap, config.parallel_mode.value])
if dist.get_rank() == 0:
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)
dist.destroy_process_group()
"""
LAUNCH_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], [False, True, None]),
        (["accelerate.commands.launch", "--config_file", "launch.yaml"], [True, False, ["LlamaDecoderLayer"]]),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(tmp_path, launcher, expected):
    (tmp_path / "script.py").write_text(LAUNCHED)
    (tmp_path / "launch.yaml").write_text(LAUNCH_FILE)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run(
        [sys.executable, "-m", *launcher, "script.py", str(tmp_path), "said.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        check=True,
        timeout=120,
    )
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == [[rank, rank, *expected, "distributed"] for rank in (0, 1)]

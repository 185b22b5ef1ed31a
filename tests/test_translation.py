"""Every spelling that people bring along means a field, is settled, is refused, or is unknown."""

from __future__ import annotations

import json

import pytest

from hf_qlora_fsdp.translation import parse_bool, parse_names, refuse_unsupported, translate_environment, translate_fsdp

ACCEPTABLE = {
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "deepspeed": None,
    "parallelism_config": None,
    "auto_find_batch_size": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "optim": "adamw_torch_fused",
    "cpu_offload": False,
    "cpu_offload_pin_memory": True,
}
# What transformers 5.23 leaves in `fsdp_config` after its own `__post_init__`.
UPSTREAM_WRITES = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}


def assert_three_parts(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert message.startswith("You gave ")
    assert " That cannot work: " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("fsdp", "values"),
    [
        (None, {}),
        (True, {}),
        ("true", {}),
        ("", {}),
        ([], {}),
        ("auto_wrap", {}),
        ("full_shard auto_wrap offload", {"reshard_after_forward": True, "cpu_offload": True}),
        (["shard_grad_op", "auto_wrap"], {"reshard_after_forward": False}),
    ],
)
def test_words_of_fsdp(fsdp, values):
    result = translate_fsdp(fsdp, None)
    assert (result.values, result.notes) == (values, [])


def test_fsdp_that_is_off_is_said_to_have_no_effect():
    assert "always shards" in translate_fsdp(False, None).notes[0]
    assert "always shards" in translate_fsdp("False", None).notes[0]


@pytest.mark.parametrize(
    ("fsdp", "words"),
    [
        ("hybrid_shard", ("reshard_after_forward=True",)),
        ("no_shard", ()),
        ("full_shrad", ("'full_shard'",)),
        ({"a": 1}, ()),
    ],
)
def test_words_of_fsdp_that_cannot_be(fsdp, words):
    with pytest.raises(ValueError) as error:
        translate_fsdp(fsdp, None)
    assert_three_parts(error, str(fsdp), *words)


@pytest.mark.parametrize("prefix", ["", "fsdp_"])
@pytest.mark.parametrize(
    ("key", "value", "field", "meant"),
    [
        ("cpu_offload", True, "cpu_offload", True),
        ("offload_params", "true", "cpu_offload", True),
        ("offload_params", "false", "cpu_offload", False),
        ("cpu_offload_pin_memory", "False", "cpu_offload_pin_memory", False),
        ("transformer_layer_cls_to_wrap", "A, B", "transformer_layer_cls_to_wrap", ["A", "B"]),
        ("transformer_cls_names_to_wrap", ["A"], "transformer_layer_cls_to_wrap", ["A"]),
        ("sharding_strategy", "FULL_SHARD", "reshard_after_forward", True),
        ("sharding_strategy", "SHARD_GRAD_OP", "reshard_after_forward", False),
        ("sharding_strategy", 2, "reshard_after_forward", False),
        ("reshard_after_forward", "0", "reshard_after_forward", False),
        ("reshard_after_forward", "shard_grad_op", "reshard_after_forward", False),
        ("activation_checkpointing", "yes", "gradient_checkpointing", True),
    ],
)
def test_options_that_mean_a_field(prefix, key, value, field, meant):
    result = translate_fsdp(True, {prefix + key: value})
    assert result.values == {field: meant}
    assert key in result.said[field]
    assert result.notes == []


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("version", 2, "1"),
        ("auto_wrap_policy", "transformer_based_wrap", "NO_WRAP"),
        ("state_dict_type", "FULL_STATE_DICT", "SHARDED_STATE_DICT"),
        ("final_state_dict_type", "FULL_STATE_DICT", "SHARDED_STATE_DICT"),
        ("use_orig_params", "true", False),
        ("sync_module_states", True, "false"),
        ("cpu_ram_efficient_loading", True, False),
        ("backward_prefetch", "BACKWARD_PRE", "BACKWARD_POST"),
        ("forward_prefetch", "false", True),
        ("limit_all_gathers", True, "no"),
    ],
)
def test_settled_options_are_silent_or_noted_once(key, same, other):
    silent, noted = translate_fsdp(True, {key: same}), translate_fsdp(True, {key: other})
    assert (silent.values, silent.notes) == ({}, [])
    assert noted.values == {}
    assert [note.partition(":")[0] for note in noted.notes] == [f"fsdp_config[{key!r}]={other!r} has no effect"]


def test_what_upstream_writes_is_silent():
    result = translate_fsdp(True, {**UPSTREAM_WRITES, "version": 2, "activation_checkpointing": False})
    assert (result.values, result.notes) == ({}, [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, ("transformer_layer_cls_to_wrap",)),
        ({"min_num_params": 100_000_000}, ("transformer_layer_cls_to_wrap",)),
        ({"sharding_strategy": "HYBRID_SHARD"}, ("reshard_after_forward=True",)),
        ({"sharding_strategy": 3}, ("split over all ranks",)),
        ({"sharding_strategy": "FULL_SHRAD"}, ("no such sharding strategy",)),
        ({"mixed_precision_policy": {"param_dtype": "bf16"}}, ("param_dtype=",)),
        ({"ignored_modules": "lm_head"}, ("Remove it.",)),
        ({"activation_checkpointing_offload": True}, ("Remove it.",)),
        ({"xla": True}, ("Remove it.",)),
        ({"xla_fsdp_settings": {"a": 1}}, ("Remove it.",)),
        ({"version": 3}, ("versions 1 and 2",)),
        ({"cpu_offload": "flase"}, ("true or false", "'flase'")),
        ({"cpu_offload": 2}, ("true or false",)),
        ({"reshard_after_forward": 8}, ("true or false",)),
        ({"transformer_layer_cls_to_wrap": 3}, ("LlamaDecoderLayer",)),
        ({"fsdp_offload_parms": True}, ("Did you mean 'offload_params'?",)),
        ({"compute_environment": "LOCAL_MACHINE"}, ("Known: ",)),
        ({"cpu_offload": True, "offload_params": False}, ("cpu_offload=True and cpu_offload=False",)),
        ({"cpu_offload": True, "fsdp_cpu_offload": False}, ("Remove one.",)),
        ("no/such/file.json", ("no/such/file.json", "JSON")),
        ("{not json", ("JSON",)),
        ("[1]", ("JSON",)),
        ([1], ("mapping",)),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError) as error:
        translate_fsdp(True, options)
    assert_three_parts(error, *words)


@pytest.mark.parametrize("as_text", [True, False])
def test_json_as_text_and_as_a_file(tmp_path, as_text):
    text = json.dumps({"fsdp_offload_params": "true"})
    path = tmp_path / "fsdp.json"
    path.write_text(text)
    assert translate_fsdp(True, text if as_text else str(path)).values == {"cpu_offload": True}


def test_the_dict_of_the_caller_is_left_alone():
    options = {"fsdp_offload_params": True}
    translate_fsdp(True, options)
    assert options == {"fsdp_offload_params": True}


def test_options_win_over_words_and_it_is_said():
    result = translate_fsdp("full_shard offload", {"reshard_after_forward": False, "cpu_offload": True})
    assert result.values == {"reshard_after_forward": False, "cpu_offload": True}
    assert result.notes == ["fsdp_config['reshard_after_forward']=False wins over fsdp='full_shard offload'."]


def test_the_defaults_of_accelerate_launch_mean_nothing():
    """Everything that accelerate 1.15 exports for `accelerate launch --use_fsdp --fsdp_version 2` and nothing else."""
    environ = {
        "FSDP_VERSION": "2",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_MIN_NUM_PARAMS": "100000000",
        "FSDP_FORWARD_PREFETCH": "false",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }
    result = translate_environment(environ)
    assert result.values == {"reshard_after_forward": True, "cpu_offload": False}  # our defaults
    assert result.notes == []


@pytest.mark.parametrize(
    ("version", "reshard", "strategy", "meant"),
    [("2", "false", "FULL_SHARD", False), ("1", "true", "SHARD_GRAD_OP", False), ("1", "false", "FULL_SHARD", True)],
)
def test_the_launchers_version_says_which_variable_counts(version, reshard, strategy, meant):
    environ = {"FSDP_VERSION": version, "FSDP_RESHARD_AFTER_FORWARD": reshard, "FSDP_SHARDING_STRATEGY": strategy}
    result = translate_environment(environ)
    assert result.values == {"reshard_after_forward": meant}
    assert len(result.notes) == (version == "1")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_IGNORED_MODULES", "lm_head"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD"),
    ],
)
def test_variables_that_cannot_be(variable, value):
    with pytest.raises(ValueError) as error:
        translate_environment({variable: value})
    assert_three_parts(error, f"{variable}={value} (from accelerate launch)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch_compile", True),
        ("torch_compile_mode", "max-autotune"),
        ("torch_compile_backend", "inductor"),
        ("deepspeed", "zero3.json"),
        ("parallelism_config", object()),
        ("auto_find_batch_size", True),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("optim", "adamw_8bit"),
        ("optim", "adamw_bnb_8bit"),
        ("optim", "paged_adamw_32bit"),
        ("optim", "lion_8bit"),
        ("optim", "ademamix"),
        ("optim", "rmsprop_bnb"),
        ("cpu_offload_pin_memory", False),
    ],
)
def test_arguments_that_cannot_work(name, value):
    with pytest.raises(ValueError) as error:
        refuse_unsupported(ACCEPTABLE | {name: value}, {})
    assert_three_parts(error, name)


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_DYNAMO_BACKEND"]
)
def test_launcher_modes_that_cannot_work(variable):
    refuse_unsupported(ACCEPTABLE, {variable: "NO" if "DYNAMO" in variable else "false"})
    with pytest.raises(ValueError) as error:
        refuse_unsupported(ACCEPTABLE, {variable: "INDUCTOR" if "DYNAMO" in variable else "true"})
    assert_three_parts(error, variable, "accelerate launch")


def test_adafactor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim='adafactor'.*adamw_torch_fused"):
        refuse_unsupported(ACCEPTABLE | {"optim": "adafactor"}, {})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_optimizers_of_torch_and_torchao_are_accepted(optim):
    refuse_unsupported(ACCEPTABLE | {"optim": optim}, {})


def test_unpinned_offload_is_accepted():
    refuse_unsupported(ACCEPTABLE | {"cpu_offload": True, "cpu_offload_pin_memory": False}, {})


def test_switches():
    assert [parse_bool("x", value) for value in (True, 1, "1", "True", "yes", " on ")] == [True] * 6
    assert [parse_bool("x", value) for value in (False, 0, "0", "False", "no", "off")] == [False] * 6
    for value in (None, 2, "", "maybe", 1.0, [True]):
        with pytest.raises(ValueError):
            parse_bool("x", value)


def test_names():
    assert parse_names("x", "A,B") == parse_names("x", ["A", " B"]) == ["A", "B"]
    assert parse_names("x", None) is None
    assert parse_names("x", "") is None

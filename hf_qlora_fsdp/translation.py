"""What people bring along: the FSDP options of other programs, read for what they mean under FSDP2.

The same few wishes have many spellings. "Keep the weights in host memory" is `fsdp="full_shard offload"` in an old
script, `cpu_offload` in transformers' `fsdp_config`, `fsdp_offload_params` in accelerate's and Axolotl's, and
`FSDP_OFFLOAD_PARAMS` in the environment that `accelerate launch` prepares. Upstream reads some of these spellings and
ignores the others without a word, so that a run without offload looks just like one with it. Here every spelling has
one of four fates:

* it **means one of our fields**: its value goes there, with a line that says so;
* it is **settled**: FSDP2 does it always, or never. Silence where the user wrote what happens anyway, else a line;
* it is **refused**: it would give another training than the user asked for. An error that says what to write;
* it is **unknown**: an error with the nearest right name.

Nothing here knows the config class or prints. The functions take plain values and return a `Translation`: values for
our fields, and the notes to be logged.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_TRUE = ("true", "1", "yes", "y", "on", "t")
_FALSE = ("false", "0", "no", "n", "off", "f")

# Every option that becomes a field of ours.
_FIELDS = {
    "cpu_offload": "cpu_offload",
    "offload_params": "cpu_offload",
    "cpu_offload_pin_memory": "cpu_offload_pin_memory",
    "transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap",
    "transformer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "reshard_after_forward": "reshard_after_forward",
    "sharding_strategy": "reshard_after_forward",
    "activation_checkpointing": "gradient_checkpointing",
}
# What happens whatever is written, and why.
_SETTLED: dict[str, tuple[bool | int | str, str]] = {
    "version": (2, "there is one engine, FSDP2, and every option is read for what it means there"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "every decoder layer is one unit"),
    "state_dict_type": ("FULL_STATE_DICT", "only the adapter is saved, whole, in PEFT's format"),
    "final_state_dict_type": ("FULL_STATE_DICT", "only the adapter is saved, whole, in PEFT's format"),
    "use_orig_params": (True, "FSDP2 shards each parameter by itself and never replaces it by a flat one"),
    "sync_module_states": (True, "all ranks read the same checkpoint, each its share"),
    "cpu_ram_efficient_loading": (True, "no rank ever holds the whole model, neither in host nor in device memory"),
    "backward_prefetch": ("BACKWARD_PRE", "FSDP2 gathers the next unit before the gradients of this one by itself"),
    "forward_prefetch": (False, "FSDP2 gathers the next unit early by itself"),
    "limit_all_gathers": (True, "FSDP2 holds two gathered units at most by itself"),
}
# What cannot be honoured, why, and what to write instead.
_XLA = ("this is a setting of PyTorch/XLA, and 4-bit weights need CUDA or a CPU", "Remove it.")
_DTYPES = (
    "packed 4-bit weights are corrupted unless one dtype serves parameters, storage and computation, so all derive "
    "from one field",
    'Write QLoRAFSDPConfig(param_dtype="bfloat16"), "float16" or "float32".',
)
_IGNORED = ("every parameter is sharded, or the memory plan would not hold", "Remove it.")
_REFUSED = {
    "min_num_params": (
        "wrapping by size cuts across decoder layers, and a LoRA pair could part from its weight",
        "Write transformer_layer_cls_to_wrap=[...], or nothing: the decoder layers are found from the model.",
    ),
    "mixed_precision_policy": _DTYPES,
    "mixed_precision": _DTYPES,
    "ignored_modules": _IGNORED,
    "ignored_params": _IGNORED,
    "activation_checkpointing_offload": (
        "it belongs to accelerate's checkpoint wrapper, which does not act here",
        "Remove it. A smaller per_device_train_batch_size or max_length, or cpu_offload=True, saves memory too.",
    ),
    "xla": _XLA,
    "xla_fsdp_v2": _XLA,
    "xla_fsdp_grad_ckpt": _XLA,
    "xla_fsdp_settings": _XLA,
}
# https://pytorch.org/docs/stable/fsdp.html#torch.distributed.fsdp.ShardingStrategy, in the order of its numbers.
_STRATEGIES = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "NO_SHARD": None, "HYBRID_SHARD": None}
_STRATEGIES["HYBRID_SHARD_ZERO2"] = None

# The optimizers of bitsandbytes, whose operators have no sharding strategy:
# https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1633
_BITSANDBYTES_OPTIMIZERS = (
    "adamw_8bit",
    "adamw_bnb",
    "ademamix",
    "galore_adamw_8bit",
    "lion_",
    "paged_",
    "rmsprop_bnb",
)
_COMPILE = ("bitsandbytes' 4-bit layers and FSDP2's hooks break the graph in every layer", "Remove it.")
_DEEPSPEED = (
    "DeepSpeed and FSDP both want to shard the model, and only FSDP shards 4-bit weights",
    "Remove it; cpu_offload=True is what ZeRO-Offload was for.",
)
_PARALLELISM = ("the model is sharded over all ranks in one dimension", "Remove it.")
_FULL_EVAL = (
    "it casts the whole model, and a cast changes the bytes of packed 4-bit weights",
    "Remove it: evaluation computes in the parameter dtype, as training does.",
)
# What cannot work with sharded 4-bit weights, as an argument or in the environment of `accelerate launch`.
_UNSUPPORTED = {
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "ACCELERATE_DYNAMO_BACKEND": _COMPILE,
    "deepspeed": _DEEPSPEED,
    "ACCELERATE_USE_DEEPSPEED": _DEEPSPEED,
    "parallelism_config": _PARALLELISM,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _PARALLELISM,
    "auto_find_batch_size": (
        "it starts over after running out of memory, and a model that is sharded cannot be wrapped again",
        "Write per_device_train_batch_size and gradient_accumulation_steps.",
    ),
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
}

# `accelerate launch` exports a value for nearly every option, most of them defaults that nobody asked for. These are
# the ones whose unusual values are somebody's wish.
_VARIABLES = {
    "FSDP_VERSION": "version",
    "FSDP_OFFLOAD_PARAMS": "offload_params",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_cls_to_wrap",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_SHARDING_STRATEGY": "sharding_strategy",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activation_checkpointing_offload",
    "FSDP_AUTO_WRAP_POLICY": "auto_wrap_policy",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_IGNORED_MODULES": "ignored_modules",
}


@dataclass
class Translation:
    """What a set of options means here.

    Attributes:
        values (`dict[str, object]`): Values for our fields; `gradient_checkpointing` may be among them.
        said (`dict[str, str]`): For each of them, what the user wrote, for the line and the errors.
        notes (`list[str]`): Lines to log about options that have no effect.
    """

    values: dict[str, object] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, value: object, said: str) -> None:
        """Keep a value for one of our fields.

        Raises:
            ValueError: Another option already gave the field another value.
        """
        if self.values.get(name, value) != value:
            raise refusal(
                f"{self.said[name]} and {said}",
                f"they ask for {name}={self.values[name]!r} and {name}={value!r}",
                f"Write QLoRAFSDPConfig({name}=...) and remove both.",
            )
        self.values[name] = value
        self.said.setdefault(name, said)


def refusal(given: str, why: str, instead: str) -> ValueError:
    """Return the error for what cannot be done: what was given, why it cannot work, what to write instead."""
    return ValueError(f"You gave {given}. That cannot work: {why}. {instead}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the right name that is nearest to a wrong one, and all right names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(known)}."


def parse_bool(said: str, value: object) -> bool:
    """Read a switch as people write it: a `bool`, 0 or 1, or a word such as `"false"`, which upstream takes for true.

    Args:
        said (`str`): The option as the user wrote it, for the error.
        value (`object`): Its value.

    Raises:
        ValueError: It is no switch.
    """
    word = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or word not in _TRUE + _FALSE:
        raise refusal(said, f"it is a switch, and {value!r} is neither on nor off", "Write true or false.")
    return word in _TRUE


def parse_names(said: str, value: object) -> list[str] | None:
    """Read class names, from a list or from a string with commas; nothing in it is `None`."""
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
        raise refusal(
            said, "it takes names of classes", 'Write transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], for example.'
        )
    return [name.strip() for name in names if name.strip()] or None


def translate_fsdp(fsdp: object, fsdp_config: object) -> Translation:
    """Read `TrainingArguments.fsdp` and `TrainingArguments.fsdp_config`.

    Args:
        fsdp (`bool`, `str`, `list[str]`, *optional*):
            A switch, or words in the style of FSDP1: `"full_shard auto_wrap offload"`.
        fsdp_config (`dict`, `str`, *optional*):
            Options with or without the prefix `fsdp_`, a JSON object as text, or the path of a JSON file. As
            upstream, it wins over the words of `fsdp`.

    Raises:
        ValueError: An option is unknown, refused, contradicted by another, or has a value that it cannot have.
    """
    words, options = _translate_words(fsdp), _translate_options(read_options(fsdp_config))
    for name, value in words.values.items():
        if options.values.get(name, value) != value:
            options.notes.append(f"{options.said[name]} wins over {words.said[name]}.")
    return Translation(words.values | options.values, words.said | options.said, words.notes + options.notes)


def translate_environment(environ: Mapping[str, str]) -> Translation:
    """Read the variables by which `accelerate launch` hands its FSDP options on.

    accelerate's plugin fills each gap from them, so that one which nobody reads here would still act.

    Args:
        environ (`Mapping[str, str]`): The environment, e.g. `os.environ`.

    Raises:
        ValueError: As [`translate_fsdp`].
    """
    given = {variable: environ[variable] for variable in _VARIABLES if environ.get(variable)}
    # The launcher exports both of them whatever the user wrote. FSDP1 reads the strategy, FSDP2 the switch.
    unread = {"1": "FSDP_RESHARD_AFTER_FORWARD", "2": "FSDP_SHARDING_STRATEGY"}
    given.pop(unread.get(given.get("FSDP_VERSION", ""), ""), None)
    result = Translation()
    for variable, value in given.items():
        one = _translate_options({_VARIABLES[variable]: value}, variable)
        for name, meant in one.values.items():
            result.take(name, meant, one.said[name])
        result.notes += one.notes
    return result


def refuse_unsupported(arguments: Mapping[str, object], environ: Mapping[str, str]) -> None:
    """Refuse what cannot work with sharded 4-bit weights, whoever asks for it.

    Args:
        arguments (`Mapping[str, object]`): Training arguments by name, with our `cpu_offload*` among them.
        environ (`Mapping[str, str]`): The environment, e.g. `os.environ`.

    Raises:
        ValueError: One of them was given.
    """
    for name, reasons in _UNSUPPORTED.items():
        value = environ.get(name) if name.isupper() else arguments[name]
        if value and str(value).lower() not in ("no", "false", "0"):
            raise refusal(f"{name}={value!r}" + " (from accelerate launch)" * name.isupper(), *reasons)
    optim = str(getattr(arguments["optim"], "value", arguments["optim"]))
    if optim.startswith(_BITSANDBYTES_OPTIMIZERS):
        raise refusal(
            f"optim={optim!r}",
            "the optimizers of bitsandbytes have no sharding strategy, and the first step fails",
            'Write optim="adamw_torch_fused": the states of LoRA weights are small.',
        )
    if optim == "adafactor":
        raise refusal(
            "optim='adafactor'",
            "its factored states are whole tensors beside sharded gradients, and the first step fails",
            'Write optim="adamw_torch_fused".',
        )
    if not arguments["cpu_offload"] and not arguments["cpu_offload_pin_memory"]:
        raise refusal(
            "cpu_offload_pin_memory=False without cpu_offload",
            "it says how offloaded shards lie in host memory, and none are offloaded",
            "Add cpu_offload=True, or remove it.",
        )


def read_options(fsdp_config: object) -> dict[str, object]:
    """Return the options of `fsdp_config` without the prefix `fsdp_`, from a dict, JSON text or a JSON file."""
    options, said = fsdp_config or {}, f"fsdp_config={fsdp_config!r}"
    if isinstance(options, str):
        try:
            if not options.lstrip().startswith("{"):
                with open(options, encoding="utf-8") as file:
                    options = file.read()
            options = json.loads(options)
        except (OSError, ValueError) as error:
            instead = "Write a dict, or the path of a JSON file that holds one object."
            raise refusal(said, f"it could not be read ({error})", instead) from error
    if not isinstance(options, Mapping):
        raise refusal(said, "it is no mapping of options", 'Write fsdp_config={"cpu_offload": True}, for example.')
    result: dict[str, object] = {}
    for key, value in options.items():
        name = str(key).removeprefix("fsdp_")
        if result.get(name, value) != value:
            raise refusal(
                f"fsdp_config with {name!r} and 'fsdp_{name}'", "they are one option with two values", "Remove one."
            )
        result[name] = value
    return result


def _translate_words(fsdp: object) -> Translation:
    """Read `fsdp`, which was a set of words before it was a switch."""
    result, said = Translation(), f"fsdp={fsdp!r}"
    if fsdp is None or fsdp == "" or fsdp == []:
        return result
    if isinstance(fsdp, (bool, int)) or str(fsdp).strip().lower() in _TRUE + _FALSE:
        if not parse_bool(said, fsdp):
            result.notes.append(f"{said} has no effect: this config always shards. SFTConfig trains without FSDP.")
        return result
    if not isinstance(fsdp, (str, list, tuple)):
        raise refusal(said, "it is a switch", "Write fsdp=True, or nothing.")
    for word in fsdp.split() if isinstance(fsdp, str) else [str(getattr(item, "value", item)) for item in fsdp]:
        if word == "offload":
            result.take("cpu_offload", True, said)
        elif word.upper() in _STRATEGIES:
            result.take("reshard_after_forward", _parse_strategy(said, word), said)
        elif word != "auto_wrap":
            known = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
            raise refusal(said, f"{word!r} means nothing to FSDP", nearest(word, known))
    return result


def _translate_options(options: Mapping[str, object], variable: str | None = None) -> Translation:
    """Read options by name; `variable` is the environment variable that they come from, if they do."""
    result = Translation()
    for key, value in options.items():
        said = f"{variable}={value} (from accelerate launch)" if variable else f"fsdp_config[{key!r}]={value!r}"
        if key in _FIELDS:
            _translate_field(result, key, value, said)
        elif key in _SETTLED:
            result.notes += _settle(key, value, said)
        elif key in _REFUSED:
            if value is not None and value != {} and str(value).strip().lower() not in ("", "[]", *_FALSE):
                raise refusal(said, *_REFUSED[key])
        else:
            hint = nearest(key, [*_FIELDS, *_SETTLED, *_REFUSED])
            raise refusal(said, "no such option exists, and transformers would ignore it in silence", hint)
    return result


def _translate_field(result: Translation, key: str, value: object, said: str) -> None:
    name = _FIELDS[key]
    if value is None:
        return
    if name == "transformer_layer_cls_to_wrap":
        result.take(name, parse_names(said, value), said)
    elif key == "sharding_strategy" or (name == "reshard_after_forward" and str(value).upper() in _STRATEGIES):
        result.take(name, _parse_strategy(said, value), said)
    elif name != "gradient_checkpointing":
        result.take(name, parse_bool(said, value), said)
    elif parse_bool(said, value):  # off means only that FSDP's own checkpointing is off, as it always is here
        result.take(name, True, said)


def _settle(key: str, value: object, said: str) -> list[str]:
    """Return the note on an option that is settled, none if it says what happens anyway."""
    settled, why = _SETTLED[key]
    if isinstance(settled, bool):
        same = value is None or parse_bool(said, value) is settled
    else:
        word = str(getattr(value, "name", value)).upper()
        if word == "SIZE_BASED_WRAP":
            raise refusal(said, *_REFUSED["min_num_params"])
        same = value is None or word == str(settled)
        if key == "version" and word not in ("1", "2", "NONE"):
            raise refusal(said, "FSDP has the versions 1 and 2", "Remove it: FSDP2 is what is used.")
    return [] if same else [f"{said} has no effect: {why}."]


def _parse_strategy(said: str, value: object) -> bool:
    """Read a sharding strategy of FSDP1, by name or number, as `reshard_after_forward`."""
    word = str(getattr(value, "name", value)).upper()
    if word in ("1", "2", "3", "4", "5"):
        word = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")[int(word) - 1]
    reshard = _STRATEGIES.get(word)
    if reshard is None:
        why = "every weight is split over all ranks" if word in _STRATEGIES else "FSDP has no such sharding strategy"
        raise refusal(
            said,
            why,
            "Write reshard_after_forward=True (FULL_SHARD, least memory) or False (SHARD_GRAD_OP, less communication).",
        )
    return reshard

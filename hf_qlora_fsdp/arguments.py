"""What can be written after `hf-qlora-fsdp train`, and in its YAML file: TRL's names, with TRL's parser.

A file for `trl sft --config` is a file for this command. The names are the fields of dataclasses: TRL's for script,
data mixture and model, ours for the training. Three things are stricter than in TRL, because a run that takes a day
should not end with the news that an option was not read:

* a name that nothing reads is an error that tells the nearest one, on the command line and in the file, and so is a
  value of another type. Names are not abbreviated;
* what contradicts itself is an error, not a warning;
* what `trl.ModelConfig` offers and 4-bit sharding settles (`load_in_4bit`, `dtype`, storage) is either what happens
  anyway, or refused.

Only names that somebody wrote are kept (`read_request`), so that "not given" and "given as the default" differ, and
nothing here joins a process group: the process that starts the workers reads the same request as they do.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig

from .config import QLoRAFSDPConfig
from .sharding import check_storage_dtype
from .translation import refusal

_HELP = "`hf-qlora-fsdp train --help` lists all."


@dataclass
class RunArguments:
    """How the command itself goes about it."""

    _argument_group_name: ClassVar[str] = "this command"

    nproc: str = field(
        default="auto",
        metadata={
            "help": "Processes to start: a number, or 'auto' for one a GPU, two without any. Under torchrun, "
            "`accelerate launch` and srun there are processes already."
        },
    )
    plot: str | None = field(
        default=None, metadata={"help": "Draw the curves of loss and memory into this PNG; needs matplotlib."}
    )


@dataclass
class DataArguments(ScriptArguments):
    """TRL's, whose `dataset_name` is a Hub id, a file (.json, .jsonl, .parquet, .csv, .txt) or a folder of files."""

    _argument_group_name: ClassVar[str] = "data"

    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, file or folder to evaluate on. If not set, `dataset_test_split` of `dataset_name`, or "
            "what `test_split_size` holds out."
        },
    )


@dataclass
class MixtureArguments(DatasetMixtureConfig):
    """TRL's, for several datasets; `test_split_size` serves a single one as well."""

    _argument_group_name: ClassVar[str] = "mixture of datasets"

    def __post_init__(self) -> None:
        if isinstance(self.datasets, DatasetConfig):  # a single path, in a file
            self.datasets = [self.datasets]
        known = [item.name for item in fields(DatasetConfig)]
        for index, entry in enumerate(self.datasets):
            given: Any = {"path": entry} if isinstance(entry, str) else entry
            if isinstance(given, DatasetConfig):
                continue
            if not isinstance(given, dict) or "path" not in given:
                raise refusal(f"datasets with the entry {given!r}", "it has no path", "Write - path: HUB_ID_OR_FILE.")
            for name in given:
                if name not in known:
                    raise _unknown(f"an entry of datasets with {name!r}", name, known, f"Known: {', '.join(known)}.")
            self.datasets[index] = DatasetConfig(**given)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, with the adapter that the trainer makes by default, and without what the training arguments have."""

    _argument_group_name: ClassVar[str] = "model and adapter"
    bnb_4bit_quant_type: ClassVar[str]  # type: ignore[misc]  # a field of QLoRAFSDPConfig, and one parser has both

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Has to be what `param_dtype` says, from which it follows.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Always: nothing but adapters can be trained here."})
    load_in_4bit: bool = field(default=True, metadata={"help": "Always."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout. Layers with dropout do not run fused (`fuse_lora`)."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    use_bnb_nested_quant: bool | None = field(  # type: ignore[assignment]  # None is "not given"
        default=None, metadata={"help": "TRL's name for `bnb_4bit_use_double_quant`."}
    )

    def __post_init__(self) -> None:
        if self.load_in_8bit or not self.load_in_4bit:
            given = "load_in_8bit=True" if self.load_in_8bit else "load_in_4bit=False"
            raise refusal(given, "only weights in 4 bits are sharded and trained here", "Leave it out.")
        if not self.use_peft:
            raise refusal(
                "use_peft=False",
                "weights in 4 bits cannot be trained themselves, only adapters on them",
                "Leave it out.",
            )
        if self.lora_task_type != "CAUSAL_LM":
            given = f"lora_task_type={self.lora_task_type!r}"
            raise refusal(given, "what is trained is a causal language model", "Leave it out.")
        super().__post_init__()


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        training (`dict[str, Any]`): Values for `QLoRAFSDPConfig`, those that were given.
    """

    run: RunArguments
    data: DataArguments
    mixture: MixtureArguments
    model: ModelArguments
    training: dict[str, Any]

    def training_arguments(self) -> QLoRAFSDPConfig:
        """Make the arguments of the trainer, which joins the process group."""
        args = QLoRAFSDPConfig(**self.training)
        if self.model.bnb_4bit_quant_storage is not None:
            storage = getattr(torch, self.model.bnb_4bit_quant_storage, None)
            if not isinstance(storage, torch.dtype):
                given = f"bnb_4bit_quant_storage={self.model.bnb_4bit_quant_storage!r}"
                raise refusal(given, "torch has no such dtype", "Leave it out: it follows param_dtype.")
            check_storage_dtype(storage, args.compute_dtype)
        options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a dict by now
        revision = self.model.model_revision if self.model.model_revision != "main" else None
        model = {"attn_implementation": self.model.attn_implementation, "dtype": self.model.dtype, "revision": revision}
        for name, value in model.items():
            if value is not None and options.setdefault(name, value) != value:
                raise refusal(
                    f"{name}={value!r}, and {options[name]!r} in model_init_kwargs",
                    "they differ",
                    "Remove one of them.",
                )
        args.model_init_kwargs = options or None
        return args


_TYPES: tuple[Any, ...] = (RunArguments, DataArguments, MixtureArguments, ModelArguments, QLoRAFSDPConfig)


class _Parser(TrlParser):
    """TRL's parser, which raises what argparse would print below a usage of four hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. {_HELP}")


def read_request(arguments: Sequence[str]) -> Request:
    """Read the command line, and the file that it names.

    Args:
        arguments (`Sequence[str]`): What follows `train`.
    Raises:
        ValueError: A name is unknown, a value is none for it, or two of them contradict each other.
        SystemExit: `--help` was among them, and is printed.
    """
    parser = make_parser()
    if {"-h", "--help"}.intersection(arguments):
        parser.print_help()
        raise SystemExit(0)
    known = {item.name for kind in _TYPES for item in fields(kind) if item.init}
    # What nobody wrote stays away, instead of arriving as a default.
    parser.set_defaults_with_config(**dict.fromkeys([*known, "config"], argparse.SUPPRESS))
    written, others = parser.parse_known_args(list(arguments))
    for other in others:
        if other.startswith("-"):
            name = other.lstrip("-").partition("=")[0].replace("-", "_")
            raise _unknown(other.partition("=")[0], name, [*known, "config"], _HELP, prefix="--")
        raise refusal(other, "it belongs to no option", f"Write --OPTION VALUE. {_HELP}")
    from_file = _read_file(written.config) if "config" in written else {}
    for name in from_file:
        if name not in known:
            raise _unknown(f"a file with the key {name!r}", name, known, _HELP)
    parser.set_defaults_with_config(**{name: _as_written(name, value) for name, value in from_file.items()})
    values = vars(parser.parse_known_args(list(arguments))[0])
    _settle(values)
    return Request(
        RunArguments(**_pick(RunArguments, values)),
        DataArguments(**_pick(DataArguments, values)),
        MixtureArguments(**_pick(MixtureArguments, values)),
        ModelArguments(**_pick(ModelArguments, values)),
        _pick(QLoRAFSDPConfig, values),
    )


def make_parser() -> TrlParser:
    """Make the parser, with TRL's names and `--config`."""
    parser = _Parser(
        _TYPES,
        prog="hf-qlora-fsdp train",
        usage="hf-qlora-fsdp train [--config FILE] [--OPTION VALUE ...]",
        description="Fine-tune a model with LoRA on 4-bit weights that are sharded across all cards. Starts its own "
        "processes, or runs under torchrun, accelerate launch or srun. Options are TRL's and those of QLoRAFSDPConfig; "
        "a YAML file holds the same names, and the command line wins over it.",
        allow_abbrev=False,
    )
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", help="YAML file of options; `env` in it sets variables")
    return parser


def _read_file(config: str) -> dict[str, Any]:
    """Return the options in a YAML file, and set the variables that it wants set."""
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise refusal(f"--config {config}", f"it cannot be read ({error})", "Name a YAML file of options.") from error
    environment = values.pop("env", None) or {} if isinstance(values, dict) else None
    if not isinstance(environment, dict):
        raise refusal(f"--config {config}", "it is no mapping of names to values", "Write NAME: VALUE on each line.")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return {str(name): value for name, value in values.items()}


def _as_written(name: str, value: Any) -> Any:
    """Return a value of a file as it would stand on the command line, so that the parser checks its type."""
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML takes for a switch
    return str(value) if isinstance(value, (bool, int, float)) else value


def _settle(values: dict[str, Any]) -> None:
    """Refuse options that contradict each other, and let TRL's names mean ours."""
    if not values.get("model_name_or_path"):
        raise refusal(
            "no model_name_or_path", "there is nothing to train", "Write --model_name_or_path HUB_ID_OR_FOLDER."
        )
    nested, double = values.get("use_bnb_nested_quant"), values.get("bnb_4bit_use_double_quant")
    if nested is not None:
        if double not in (None, nested):
            raise refusal(
                f"use_bnb_nested_quant={nested} and bnb_4bit_use_double_quant={double}",
                "they are one option with two values",
                "Remove one of them.",
            )
        values["bnb_4bit_use_double_quant"] = nested
    if values.pop("ignore_bias_buffers", False):
        raise refusal("ignore_bias_buffers=True", "it mends DDP, which does not act here", "Leave it out.")
    _check_data(values)


def _check_data(values: dict[str, Any]) -> None:
    several = [name for name in ("datasets", "streaming") if values.get(name)]
    single = [name for name in values if name.startswith("dataset_") and name in DataArguments.__dataclass_fields__]
    if several and single:
        raise refusal(
            f"{several[0]} and {single[0]}",
            "the first is about a mixture of datasets, the second about one",
            "Write `datasets` with an entry for each of them, or `dataset_name` alone.",
        )
    if not values.get("datasets") and not values.get("dataset_name"):
        raise refusal("neither dataset_name nor datasets", "there is nothing to train on", "Write --dataset_name PATH.")
    held_out = [name for name in ("eval_dataset_name", "test_split_size", "dataset_test_split") if name in values]
    strategy = values.get("eval_strategy", "no")
    if held_out and str(getattr(strategy, "value", strategy)) == "no":
        raise refusal(
            f"{held_out[0]} and no eval_strategy",
            "nothing would be evaluated",
            "Write --eval_strategy steps, or epoch.",
        )
    if "test_split_size" in held_out and len(held_out) > 1:
        raise refusal(" and ".join(held_out), "each says what to evaluate on", "Keep one of them.")
    if strategy != "no" and not held_out and values.get("datasets"):
        raise refusal(
            f"eval_strategy={strategy} with datasets, which are all trained on",
            "there is nothing to evaluate on",
            "Write --eval_dataset_name PATH, or --test_split_size FRACTION.",
        )


def _unknown(given: str, name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> ValueError:
    close = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"Did you mean {' or '.join(prefix + other for other in close)}? " if close else ""
    return refusal(given, "nothing reads an option of that name", f"{hint}{otherwise}")


def _pick(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.init and item.name in values}

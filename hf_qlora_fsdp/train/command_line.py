"""The command line of `hf-qlora-fsdp train`, and the YAML file that it may name, read with TRL's parser.

Stricter than TRL, because a run that takes a day should not end with the news that an option was not read:

* a name that nothing reads is an error that tells the nearest ones, on the command line and in the file, and so is a
  value of another type. Names are not abbreviated;
* what contradicts itself is an error, not a warning.

Only names that somebody wrote are kept, so that "not given" and "given as the default" differ, and nothing here joins a
process group: the process that starts the workers reads the same request as they do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import ScriptArguments, TrlParser

from ..config import QLoRAFSDPConfig
from ..conversion import convert, find_program
from ..conversion.yaml_files import load_yaml
from ..translation import refusal
from .arguments import ALL, DataArguments, MixtureArguments, ModelArguments, Request, RunArguments, unknown_name
from .ranges import check_ranges

_FILES = ("config", "axolotl")
_HELP = "`hf-qlora-fsdp train --help` lists all."


class _Parser(TrlParser):
    """TRL's parser, which raises what argparse would print below a usage of four hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. {_HELP}")


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
    known = {item.name for kind in ALL for item in fields(kind) if item.init}
    # What nobody wrote stays away, instead of arriving as a default.
    parser.set_defaults_with_config(**dict.fromkeys([*known, *_FILES], argparse.SUPPRESS))
    written, others = parser.parse_known_args(list(arguments))
    for other in others:
        if other.startswith("-"):
            name = other.lstrip("-").partition("=")[0].replace("-", "_")
            raise unknown_name(other.partition("=")[0], name, [*known, *_FILES], _HELP, prefix="--")
        raise refusal(other, "it belongs to no option", f"Write --OPTION VALUE. {_HELP}")
    from_file, notes = _read_files(**{name: getattr(written, name, None) for name in _FILES})
    for name in from_file:
        if name not in known:
            program, file = find_program(name), getattr(written, "config", None)
            theirs = f"If the file is one of {program}, which has that key, write --axolotl {file}. " if program else ""
            raise unknown_name(f"a file with the key {name!r}", name, known, theirs + _HELP)
    hints = {name: str(hint) for kind in ALL for name, hint in get_type_hints(kind).items()}
    parser.set_defaults_with_config(**{name: _as_written(name, from_file[name], hints[name]) for name in from_file})
    values = vars(parser.parse_known_args(list(arguments))[0])
    padding = values.get("pad_to_multiple_of")
    if isinstance(padding, str) and padding.isdecimal():  # a number, or "auto": upstream's parser leaves both as text
        values["pad_to_multiple_of"] = int(padding)
    _settle(values)
    return Request(
        RunArguments(**_pick(RunArguments, values)),
        DataArguments(**_pick(DataArguments, values)),
        MixtureArguments(**_pick(MixtureArguments, values)),
        ModelArguments(**_pick(ModelArguments, values)),
        _pick(QLoRAFSDPConfig, values),
        notes,
    )


def make_parser() -> TrlParser:
    """Make the parser, with TRL's names and two for files."""
    parser = _Parser(
        ALL,
        prog="hf-qlora-fsdp train",
        usage="hf-qlora-fsdp train [--config FILE | --axolotl FILE] [--OPTION VALUE ...]",
        description="Fine-tune a model with LoRA on 4-bit weights that are sharded across all cards. Starts its own "
        "processes, or runs under torchrun, accelerate launch or srun. Options are TRL's and those of QLoRAFSDPConfig; "
        "a YAML file holds the same names, and the command line wins over it.",
        allow_abbrev=False,
    )
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", help="YAML file of options; `env` in it sets variables")
    files.add_argument(
        "--axolotl",
        metavar="FILE",
        nargs="+",
        help="YAML file of Axolotl, or another that `hf-qlora-fsdp convert` reads; several if a run is written in "
        "several, as in LLaMA-Factory's and accelerate's",
    )
    return parser


def _read_files(config: str | None, axolotl: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """Return the options of the file that is named, and what is to be said about them."""
    if config and axolotl:
        names = " ".join(axolotl)
        raise refusal(
            f"--config {config} and --axolotl {names}",
            "both say how to train, and neither is meant to win",
            f"Run `hf-qlora-fsdp convert {names}`, and put both into one file.",
        )
    if axolotl:
        conversion = convert(*axolotl)
        return dict(conversion.arguments), conversion.notes
    return (_read_config(config) if config else {}), []


def _read_config(config: str) -> dict[str, Any]:
    """Return the options in a YAML file, and set the variables that it wants set."""
    try:
        values = load_yaml(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = f"it cannot be read ({' '.join(str(error).split())})"
        raise refusal(f"--config {config}", why, "Name a YAML file of options, each of them once.") from error
    environment = values.pop("env", None) or {} if isinstance(values, dict) else None
    if not isinstance(environment, dict):
        raise refusal(f"--config {config}", "it is no mapping of names to values", "Write NAME: VALUE on each line.")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return {str(name): value for name, value in values.items()}


def _as_written(name: str, value: Any, hint: str) -> Any:
    """Return a value of a file as it would stand on the command line, so that the parser checks its type."""
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML takes for a switch
    for kind in (list, dict):
        if isinstance(value, kind) and kind.__name__ not in hint:
            raise refusal(f"a file with {name}: {value!r}", f"a {kind.__name__} is no value for it", _HELP)
    return value if value is None or isinstance(value, (list, dict)) else str(value)


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
    check_ranges(values)
    if values.get("packing") and values.get("max_length", 1) is None:
        raise refusal("packing=True and max_length=null", "rows are packed up to a length", "Write --max_length N.")
    _check_data(values)


def _check_data(values: dict[str, Any]) -> None:
    several = [name for name in ("datasets", "streaming") if values.get(name)]
    single = [name for name in values if name.startswith("dataset_") and name in ScriptArguments.__dataclass_fields__]
    if several and single:
        raise refusal(
            f"{several[0]} and {single[0]}",
            "the first is about a mixture of datasets, the second about one",
            "Write `datasets` with an entry for each of them, or `dataset_name` alone.",
        )
    if not values.get("datasets") and not values.get("dataset_name"):
        raise refusal("neither dataset_name nor datasets", "there is nothing to train on", "Write --dataset_name PATH.")
    streaming = values.get("streaming") or values.get("dataset_streaming")
    if streaming and int(values.get("max_steps", 0)) < 1:
        raise refusal("streaming without max_steps", "nobody knows where such data end", "Write --max_steps N.")
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


def _pick(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.init and item.name in values}

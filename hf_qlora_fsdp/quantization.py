"""How a base was quantised, written down beside the adapter that was trained on it.

An adapter belongs to weights that were rounded to 4 bits in one certain way. `adapter_config.json` names the base and
not that way, so whoever merges the adapter, or loads it again, would have to remember it. Here each adapter's folder
has one more file, `base_quantization.json`, with the arguments of `transformers.BitsAndBytesConfig`:

    {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
     "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}

PEFT opens files by their names and leaves this one alone. `settle` is what a merge makes of it: what the caller says,
what the adapter says and what the base says must not contradict each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ranks import log_once

QUANTIZATION_FILE = "base_quantization.json"

FIELDS = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "skip_modules": "llm_int8_skip_modules",
}
"""Arguments of `merge_adapter`, and what `BitsAndBytesConfig` calls them."""

DEFAULTS: dict[str, Any] = {
    "quant_type": "nf4",
    "double_quant": True,
    "compute_dtype": "bfloat16",
    "skip_modules": None,
}


def write_quantization(folder: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write the fields, by the names in `FIELDS`, into an adapter's folder."""
    described = {"load_in_4bit": True} | {FIELDS[name]: value for name, value in fields.items()}
    (Path(folder) / QUANTIZATION_FILE).write_text(json.dumps(described, indent=2) + "\n")


def read_quantization(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the fields back.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        described = json.loads(Path(file).read_text())
        return {name: described[stored] for name, stored in FIELDS.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} does not say how the base was quantised ({error!r}): it is cut short or was written by "
            "something else. Copy the adapter again, or remove the file and say quant_type, double_quant, "
            "compute_dtype and skip_modules yourself."
        ) from error


def settle(said: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]], trained: bool) -> dict[str, Any]:
    """Decide how the base is quantised, of what the caller says, what is recorded, and the defaults.

    Args:
        said (`Mapping`): The caller's fields; `None` where nothing is said.
        sources (`Mapping[str, Mapping]`): What else is known, by where it comes from, the surest first.
        trained (`bool`): Whether the weights of the training are wanted. If not, the caller is free to choose others.
    Returns:
        `dict`: A value for each field.
    Raises:
        ValueError: Two of them contradict each other. Names both.
    """
    settled = {}
    for name, default in DEFAULTS.items():
        known = {source: fields[name] for source, fields in sources.items() if fields.get(name) is not None}
        if said.get(name) is not None:
            known = {"what was asked for": said[name]} | known
        values = list(known.items())
        settled[name] = values[0][1] if values else default
        # Which modules are meant by two lists is only known where there is a model: see `MergePlan`.
        other = next(((source, value) for source, value in values[1:] if value != values[0][1]), None)
        if trained and other is not None and name != "skip_modules":
            raise ValueError(
                f"{name}={values[0][1]!r} according to {values[0][0]}, but {name}={other[1]!r} according to "
                f"{other[0]}. The adapter was trained on weights that were quantised in one of these ways, and fits no "
                f"others. Leave {name} out, and pass the base that the adapter was trained on."
            )
    guessed = sorted(
        name for name in DEFAULTS if not any(name in fields for fields in (*sources.values(), _said(said)))
    )
    if trained and guessed:
        log_once(
            "Nothing says how the base was quantised in training: taken to be %s. Pass what was different.",
            ", ".join(f"{name}={settled[name]!r}" for name in guessed),
        )
    return settled


def _said(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}

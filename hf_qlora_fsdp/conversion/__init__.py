"""Files that people already have, for `hf-qlora-fsdp train`: Axolotl's, accelerate's and LLaMA-Factory's.

`convert` finds out whose file it is by counting the keys that each program knows, and returns the same run in the names
of ours. The promise is that nothing changes unseen: a key is either used, or named in a note with the reason why it
makes no difference, or an error, because the result would be another. `foreign_keys.py` holds every reader to that:
`axolotl.py` (with `axolotl_data.py` and `axolotl_steps.py`), `llama_factory.py` and `accelerate.py`. What becomes of
each key stands in tables, `*_keys.py`.

A run may be written in two files: LLaMA-Factory's recipe for FSDP and QLoRA is one of its own, and accelerate's beside
it. They become one run, in which no option has two values.

Nothing here imports torch or TRL, so a file is converted in a blink. That the names exist is held by a test.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..translation import refusal
from . import accelerate, axolotl, llama_factory
from .yaml_files import load_yaml

_Reader = Callable[[dict[Any, Any]], tuple[dict[str, object], list[str]]]
_READERS: dict[str, tuple[frozenset[str], _Reader]] = {
    axolotl.PROGRAM: (axolotl.KEYS, axolotl.read_axolotl),
    llama_factory.PROGRAM: (llama_factory.KEYS, llama_factory.read_llama_factory),
    accelerate.PROGRAM: (accelerate.KEYS, accelerate.read_accelerate),
}
_OURS = frozenset(("use_peft", "dataset_name"))
"""Keys of a file for `train --config` that no other program has."""
_KINDS = "Give an Axolotl file (base_model: ...), an accelerate file (fsdp_config: ...) or a LLaMA-Factory file."


@dataclass(frozen=True)
class Conversion:
    """
    A file of another program in our terms.

    Attributes:
        program (`str`): Whose file it was.
        name (`str`): Its name.
        arguments (`dict[str, object]`): Options of `hf-qlora-fsdp train`, by name.
        notes (`list[str]`): A line for each key that is not used, and for what is done differently without one.
    """

    program: str
    name: str
    arguments: dict[str, object]
    notes: list[str]

    def to_yaml(self) -> str:
        """Return the file for `hf-qlora-fsdp train --config`, with the notes as comments."""
        lines = [f"{self.name} of {self.program}, for hf-qlora-fsdp train --config", *self.notes]
        comments = [textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="#   ") for line in lines]
        return "\n".join(comments) + "\n" + yaml.safe_dump(self.arguments, sort_keys=False, allow_unicode=True)


def convert(*paths: str | Path) -> Conversion:
    """Convert the file of a run, or the files of one.

    Args:
        *paths (`str` or `Path`): YAML or JSON files of Axolotl, accelerate or LLaMA-Factory.

    Raises:
        ValueError: There is no such file, it is none of theirs, or one of its keys is unknown, has no possible value,
            or would change the result and cannot be honoured; or two files contradict each other.
    """
    first, *others = (_convert(path) for path in paths)
    for other in others:
        for name, value in other.arguments.items():
            if first.arguments.get(name, value) != value:
                given = f"files that mean {name}={first.arguments[name]!r} ({first.name}) and {value!r} ({other.name})"
                raise refusal(given, "they are one option with two values", "Let them agree, or convert one of them.")
        first = Conversion(
            f"{first.program} and {other.program}",
            f"{first.name} and {other.name}",
            first.arguments | other.arguments,
            first.notes + [note for note in other.notes if note not in first.notes],
        )
    return first


def _convert(path: str | Path) -> Conversion:
    file = _read_file(Path(path))
    known = {program: len(keys.intersection(map(str, file))) for program, (keys, _) in _READERS.items()}
    program = max(known, key=lambda name: known[name])
    ours = _OURS.intersection(file)
    if ours:
        instead = f"Run hf-qlora-fsdp train --config {path}."
        raise refusal(f"the file {str(path)!r}", f"it is written in our names already ({min(ours)})", instead)
    if known[program] == 0:
        raise refusal(f"the file {str(path)!r}", "none of its keys belong to a program that is known", _KINDS)
    arguments, notes = _READERS[program][1](file)
    return Conversion(program, Path(path).name, arguments, notes)


def find_program(key: str) -> str | None:
    """Return whose key it is, the first program of those that have it."""
    return next((program for program, (keys, _) in _READERS.items() if key in keys), None)


def _read_file(path: Path) -> dict[Any, Any]:
    given = f"the file {str(path)!r}"
    try:
        file = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise refusal(given, "there is no such file", "Correct the path.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise refusal(given, f"it cannot be read ({' '.join(str(error).split())})", _KINDS) from error
    if file is None:
        raise refusal(given, "it is empty", _KINDS)
    if not isinstance(file, Mapping):
        raise refusal(given, f"it is a {type(file).__name__} and no mapping of keys to values", _KINDS)
    return dict(file)

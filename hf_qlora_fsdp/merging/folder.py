"""The folder that a merge fills: whose it is, how far it has come, and what lies in it beside the weights.

`merge.json` says from what and how the folder is made, and which of its files are finished. A merge that is started
again finds it, checks that base, adapter and options are the same, and goes on with the first unfinished file.
`config.json` comes last, so a folder that was left half done is not loaded by mistake.

The base is recognised by its config, by the headers and sizes of its files, and by samples spread over them: reading
all of a 140 GB checkpoint twice only to know its name would take as long as the merge. The adapter is hashed whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, list_repo_templates

from .shards import write_json

MANIFEST = "merge.json"

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class MergeFolder:
    """The output of one merge, new or resumed.

    Args:
        path (`str`): The folder.
        identity (`dict`): What is merged and how. JSON; a resumed merge must have the same.
    Raises:
        ValueError: The folder holds something else, or a merge of something else.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output={str(path)!r} is a file, and a merged model is a folder. Name a new folder.")
        manifest = self.path / MANIFEST
        if manifest.is_file():
            self.manifest = json.loads(manifest.read_text())
            different = [key for key in identity if self.manifest["identity"].get(key) != identity[key]]
            if different:
                raise ValueError(
                    f"output={str(path)!r} holds a merge of another {' and '.join(different)} "
                    f"({_shown(self.manifest['identity'], different)}, now {_shown(identity, different)}), and the "
                    "two must not mix. Name a new folder, or repeat the merge that was begun there."
                )
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"output={str(path)!r} is not empty, and what is in it was not written by a merge. Files of two models "
                "would mix. Name a new folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.manifest = {"identity": identity, "finished": {}, "complete": False}
        write_json(manifest, self.manifest)

    def is_finished(self, name: str) -> bool:
        file = self.path / name
        return file.is_file() and self.manifest["finished"].get(name) == file.stat().st_size

    def mark_finished(self, name: str) -> None:
        self.manifest["finished"][name] = (self.path / name).stat().st_size
        write_json(self.path / MANIFEST, self.manifest)

    def complete(self, config: dict[str, Any], versions: dict[str, str]) -> None:
        """Write the config, which makes the folder a model."""
        write_json(self.path / "config.json", config)
        self.manifest |= {"complete": True, "versions": versions}
        write_json(self.path / MANIFEST, self.manifest)

    def copy_companions(self, base: str, adapter: str, config_file: str, hub: dict[str, Any]) -> None:
        """Copy tokenizer, chat template and generation config, from the adapter if it has them, and the base's code."""
        finders = [_Finder(adapter, {name: hub[name] for name in ADAPTER_HUB if name in hub}), _Finder(base, hub)]
        tokenizer = next((finder for finder in finders if finder.find(*_TOKENIZER_FILES)), None)
        templates = next((finder for finder in finders if finder.has_template()), None)
        generation = next((finder for finder in finders if finder.find("generation_config.json")), None)
        found = tokenizer.find(*_TOKENIZER_FILES) if tokenizer else {}
        found |= templates.find(*_TEMPLATE_FILES, *templates.extra_templates()) if templates else {}
        found |= generation.find("generation_config.json") if generation else {}
        found |= {file.name: str(file) for file in Path(config_file).parent.glob("*.py")}  # what auto_map names
        for name, file in found.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, self.path / name)


ADAPTER_HUB = ("token", "cache_dir", "local_files_only")
"""Arguments for the Hub that hold for base and adapter alike; `revision` and `subfolder` are the base's."""


class _Finder:
    def __init__(self, source: str, hub: dict[str, Any]) -> None:
        self.source = source
        self.hub = hub

    def find(self, *names: str) -> dict[str, str]:
        quiet = {"_raise_exceptions_for_missing_entries": False, **self.hub}
        found = {name: cached_file(self.source, name, **quiet) for name in names}
        return {name: file for name, file in found.items() if file is not None}

    def has_template(self) -> bool:
        if self.find(*_TEMPLATE_FILES) or self.extra_templates():
            return True
        config = self.find("tokenizer_config.json")  # where older versions keep it
        return bool(config) and "chat_template" in json.loads(Path(config["tokenizer_config.json"]).read_text())

    def extra_templates(self) -> list[str]:
        folder = "additional_chat_templates"
        if os.path.isdir(self.source):
            inside = Path(self.source, self.hub.get("subfolder", ""), folder)
            return [f"{folder}/{file.name}" for file in inside.glob("*.jinja")]
        names = list_repo_templates(
            self.source,
            local_files_only=bool(self.hub.get("local_files_only")),
            **{name: self.hub[name] for name in ("revision", "cache_dir", "token") if name in self.hub},
        )
        # With the ending from the Hub, without it from the cache (transformers 5.23).
        return [f"{folder}/{name.removesuffix('.jinja')}.jinja" for name in names]


def fingerprint_checkpoint(config_file: str, files: list[str]) -> str:
    """Return a hash by which a checkpoint is recognised without reading all of it (see the module docstring)."""
    digest = hashlib.sha256(Path(config_file).read_bytes())
    for file in files:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            digest.update(f"{os.path.basename(file)} {size} ".encode() + stream.read(header_bytes))
            for number in range(_NUM_SAMPLES):
                stream.seek(
                    8 + header_bytes + max(0, size - 8 - header_bytes - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1)
                )
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _shown(identity: dict[str, Any], keys: list[str]) -> str:
    shown = {key: identity.get(key) for key in keys}
    return ", ".join(f"{key}={value[:12] if isinstance(value, str) else value}" for key, value in shown.items())

"""The safetensors files of a checkpoint: where they are, what is in them, and reading one tensor at a time.

Nothing is read before everything that can be known from the headers is known to be right: a header is a few hundred
kilobytes, and an hour of download deserves a file that is whole. Every byte read is counted (`bytes_read`), because
"each rank reads its share" is a promise that a test holds.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: str
    shape: tuple[int, ...]
    num_bytes: int


class Weights:
    """The tensors of a checkpoint, by the names they have there.

    Args:
        files (`list[str]`): Paths of its safetensors files.
    Raises:
        ValueError: A file is missing or cut short. Names the file and the first tensor lost.
    """

    def __init__(self, files: list[str]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        for file in files:
            self.tensors |= _read_header(file)

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory."""
        stored = self.tensors[name]
        # A handle a tensor: pages of the mapping count as this process's memory for as long as it stays open.
        with safe_open(stored.file, framework="pt") as handle:
            tensor = handle.get_tensor(name)
        self.bytes_read += stored.num_bytes
        return tensor


def find_weights(model_id_or_path: str, **hub: object) -> list[str]:
    """Find the safetensors files of a model, downloading them if need be.

    Args:
        model_id_or_path (`str`): Hub id or folder.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `force_download` as in
            `from_pretrained`.
    Returns:
        `list[str]`: Paths of the files, one or many.
    Raises:
        ValueError: There are none: an adapter, pickled `.bin` files, a GGUF, or nothing at all.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    single = cached_file(model_id_or_path, SAFE_WEIGHTS_NAME, **quiet)  # where both are, transformers takes this one
    if single is not None:
        return [single]
    index = cached_file(model_id_or_path, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is not None:
        return _shard_files(model_id_or_path, index, hub)
    for name, what, instead in (
        ("adapter_config.json", "is a LoRA adapter", "Pass the base model that its adapter_config.json names."),
        (WEIGHTS_NAME, "holds pickled .bin weights", _CONVERT_BIN),
        (WEIGHTS_INDEX_NAME, "holds pickled .bin weights", _CONVERT_BIN),
    ):
        if cached_file(model_id_or_path, name, **quiet) is not None:
            raise ValueError(
                f"{model_id_or_path!r} {what} and no safetensors file, so it cannot be read tensor by tensor. {instead}"
            )
    raise ValueError(
        f"{model_id_or_path!r} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, so there is nothing to "
        "load. Check the folder, or the name and revision on the Hub."
    )


_CONVERT_BIN = (
    "Save it once with AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder), which writes safetensors."
)


def _shard_files(model_id_or_path: str, index: str, hub: dict[str, object]) -> list[str]:
    if not os.path.isdir(model_id_or_path):
        files, _ = get_checkpoint_shard_files(model_id_or_path, index, **hub)
        return list(files)
    weight_map = json.loads(Path(index).read_text())["weight_map"]
    files = [str(Path(index).parent / file) for file in sorted(set(weight_map.values()))]
    for file in files:
        if not os.path.isfile(file):
            lost = next(tensor for tensor, name in weight_map.items() if name == os.path.basename(file))
            raise ValueError(
                f"{os.path.basename(file)!r} is missing from {model_id_or_path!r}, so {lost!r} and what else it holds "
                "cannot be loaded. Download the checkpoint again; the folder must hold every file of its index."
            )
    return files


def _read_header(file: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt"):  # safetensors itself checks that the file holds all it announces
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(_describe_damage(file, error)) from error
    return {
        name: StoredTensor(file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in _parse_header(file)[0].items()
    }


def _parse_header(file: str) -> tuple[dict[str, dict], int]:
    """Return the header and where the data begins.

    Source:
        https://huggingface.co/docs/safetensors/index#format: 8 bytes of header length, JSON, data.
    """
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _describe_damage(file: str, error: Exception) -> str:
    size, first_lost = os.path.getsize(file), ""
    try:
        header, start = _parse_header(file)
        lost = [name for name, entry in header.items() if start + entry["data_offsets"][1] > size]
        first_lost = f", from tensor {min(lost, key=lambda name: header[name]['data_offsets'])!r} on" if lost else ""
    except (struct.error, ValueError, MemoryError, OverflowError):
        first_lost = ", its header included"
    return (
        f"{os.path.basename(file)!r} ({size:,} bytes) is cut short or damaged{first_lost}: {error}. A model with "
        f"missing weights cannot be trained. Delete {file!r} and download it again."
    )

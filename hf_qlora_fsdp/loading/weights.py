"""The safetensors files of a checkpoint: where they are, what is in them, and reading one tensor at a time.

Nothing is read before everything that can be known from the headers is known to be right: a header is a few hundred
kilobytes, and an hour of download deserves a file that is whole. Every byte read is counted (`bytes_read`), because
"each rank reads its share" is a promise that a test holds.

**Reading ahead.** A disk is at its best with several reads under way, and idle while a tensor is being quantised. Who
knows the order of its reads says so (`Weights.reading_ahead`): a few threads then read tensors in that order, block by
block, into buffers of host memory, ahead of the one that is asked for. The memory is bounded: what has been read or is
being read, and not yet released, is never more than the budget (one tensor larger than that is read alone).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: str
    shape: tuple[int, ...]
    num_bytes: int
    dtype: str
    offset: int


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes by their names in safetensors files."""

BLOCK_BYTES = 1 << 24
"""What is read, and checked, at once."""

_NUM_READERS = 8
_SAMPLE_BYTES = 64
_BLOB = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")
"""A file in the Hub's cache is called by its hash: SHA-256 for large files, that of git for others."""

BlockCheck = Callable[[str, int, memoryview], None]
"""Is given each block that was read, as name of the tensor, number, and bytes, in the thread that read it."""


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
        self.files = files
        self._ahead: _ReadAhead | None = None
        for file in files:
            self.tensors |= _read_header(file)

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def revision(self) -> str | None:
        """The commit on the Hub that the files are of, `None` for those of a folder."""
        return extract_commit_hash(self.files[0], None)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory, or take it from what was read ahead."""
        stored = self.tensors[name]
        if self._ahead is not None and name in self._ahead:
            tensor = self._ahead.take(name)
        else:
            # A handle a tensor: pages of the mapping count as this process's memory for as long as it stays open.
            with safe_open(stored.file, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        self.bytes_read += stored.num_bytes
        return tensor

    def read_row(self, name: str, index: int) -> torch.Tensor:
        """Read what a tensor has at one index of its first dimension."""
        stored = self.tensors[name]
        num_bytes = stored.num_bytes // stored.shape[0]
        row = torch.empty(num_bytes, dtype=torch.uint8)
        with open(stored.file, "rb", buffering=0) as stream:  # safetensors would map the whole file for a slice
            stream.seek(stored.offset + index * num_bytes)
            num_read = 0
            while num_read < num_bytes:
                got = stream.readinto(row.numpy().data[num_read:])
                if not got:
                    raise OSError(f"{stored.file!r} has become shorter while it was read")
                num_read += got
        self.bytes_read += num_bytes
        return row.view(DTYPES[stored.dtype]).reshape(stored.shape[1:])

    @contextlib.contextmanager
    def reading_ahead(self, names: Iterable[str], budget_bytes: int, check: BlockCheck | None = None) -> Iterator[None]:
        """Read tensors in the background, in the order in which `read` will be asked for them.

        Args:
            names (`Iterable[str]`): The tensors.
            budget_bytes (`int`): Host memory for tensors from the start of their reading to their `release`.
            check (`Callable`, *optional*): Is given each block; what it raises, `read` raises.
        """
        known = [name for name in names if self.tensors[name].dtype in DTYPES]
        self._ahead = _ReadAhead(self.tensors, known, budget_bytes, check)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def release(self, names: Iterable[str]) -> None:
        """Say that these tensors, as they were read, are not needed any more, so that others can be read ahead."""
        if self._ahead is not None:
            self._ahead.release(names)

    def identify(self) -> list[dict[str, object]]:
        """Say which files these are, without reading them and wherever they lie.

        A file of the Hub's cache is known by its hash. Any other is known by its size, its time of modification, its
        header, and 64 bytes from the middle of each tensor: two trainings of one model differ in all of them, and a
        file that was changed in place differs in its time. A change that keeps size and time, and spares the middle of
        every tensor, is not noticed.
        """
        tensors: dict[str, list[StoredTensor]] = {file: [] for file in sorted(self.files)}
        for stored in self.tensors.values():
            tensors[stored.file].append(stored)
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return list(pool.map(self._identify, tensors, tensors.values()))

    def _identify(self, file: str, tensors: list[StoredTensor]) -> dict[str, object]:
        status, real = os.stat(file), os.path.basename(os.path.realpath(file))
        known: dict[str, object] = {"name": os.path.basename(file), "bytes": status.st_size}
        if os.path.islink(file) and _BLOB.match(real):
            return {**known, "blob": real}
        with open(file, "rb") as stream:
            digest = hashlib.sha256(stream.read(min((stored.offset for stored in tensors), default=-1)))
            for stored in sorted(tensors, key=lambda stored: stored.offset):
                stream.seek(stored.offset + max(0, stored.num_bytes - _SAMPLE_BYTES) // 2)
                digest.update(stream.read(min(_SAMPLE_BYTES, stored.num_bytes)))
        return {**known, "modified_ns": status.st_mtime_ns, "sample_sha256": digest.hexdigest()}


class _ReadAhead:
    """Reads tensors in a given order, in a few threads, as far ahead as its memory allows.

    Memory is given back by the one who reads, so that is also when the next tensors are begun: there is no thread that
    waits, and none to be stopped.
    """

    def __init__(
        self, tensors: dict[str, StoredTensor], names: list[str], budget_bytes: int, check: BlockCheck | None
    ) -> None:
        self.tensors, self.check = tensors, check
        self.waiting = deque(names)
        self.budget_bytes, self.bytes_held = budget_bytes, 0
        self.begun: dict[str, tuple[torch.Tensor, list[Future[None]]]] = {}
        self.held: set[str] = set()
        self.pool = ThreadPoolExecutor(_NUM_READERS, "reading ahead")
        # Open to the end, so that a file that is removed meanwhile is read all the same.
        self.descriptors = {file: os.open(file, os.O_RDONLY) for file in {tensors[name].file for name in names}}
        self._go_on()

    def __contains__(self, name: str) -> bool:
        return name in self.begun or name in self.waiting

    def take(self, name: str) -> torch.Tensor:
        if name not in self.begun:  # asked for out of turn
            self.waiting.remove(name)
            self._begin(name)
        buffer, blocks = self.begun.pop(name)
        for block in blocks:
            block.result()
        stored = self.tensors[name]
        return buffer.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def release(self, names: Iterable[str]) -> None:
        for name in self.held.intersection(names):
            self.held.remove(name)
            self.bytes_held -= self.tensors[name].num_bytes
        self._go_on()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def _go_on(self) -> None:
        while self.waiting:
            if self.held and self.bytes_held + self.tensors[self.waiting[0]].num_bytes > self.budget_bytes:
                break
            self._begin(self.waiting.popleft())

    def _begin(self, name: str) -> None:
        num_bytes = self.tensors[name].num_bytes
        self.held.add(name)
        self.bytes_held += num_bytes
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        read = partial(self._read_block, name, view)
        self.begun[name] = buffer, [self.pool.submit(read, start) for start in range(0, num_bytes, BLOCK_BYTES)]

    def _read_block(self, name: str, view: memoryview, start: int) -> None:
        stored = self.tensors[name]
        block = view[start : start + BLOCK_BYTES]
        num_read = 0
        while num_read < len(block):
            got = os.preadv(self.descriptors[stored.file], [block[num_read:]], stored.offset + start + num_read)
            if not got:
                raise OSError(f"{stored.file!r} has become shorter while it was read")
            num_read += got
        if self.check is not None:
            self.check(name, start // BLOCK_BYTES, block)


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
    header, start = _parse_header(file)
    stored = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        stored[name] = StoredTensor(file, tuple(entry["shape"]), end - begin, entry["dtype"], start + begin)
    return stored


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

"""Writing a shard cache while a model is loaded, whole or not at all.

    .writing-KEY-NONCE/          one folder a run, on each node
        rank-0.safetensors       written by a thread of rank 0, tensor after tensor, while rank 0 makes the next ones
        rank-0.json              once that file has reached the disk: its checksums
        rank-1.safetensors  ...
        manifest.json            by the rank that finds all others done
    KEY/                         the same folder, renamed

All shapes are known before the first tensor is made, so the header of a safetensors file is written first and the
tensors follow as they come. Loading does not wait for the disk: what waits to be written lies in host memory, no more
than the largest tensor's size (on a CPU, where that would be memory of the device, nothing waits). The flush to disk
and the renaming happen in the thread as well, after the model is there; a process that ends waits for them.

**Ranks agree through the folder.** No rank waits for another one: who is done looks whether all are, and the file
system lets one of them create the manifest. Two runs that write the same cache have folders of their own, and the
second rename fails, which is as good. A run that is killed leaves a folder that nobody reads; the next writer removes
those that nothing was written to for an hour.

**A disk that is full** costs the cache and nothing else. The folder is renamed out of the way, one rank of the node can
do that, and that one says so; the others notice that it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch

from ..files import flush
from .weights import BLOCK_BYTES, DTYPES

MANIFEST = "manifest.json"

_LEFTOVERS = (".writing-*", ".removed-*")
_DEAD_AFTER_SECONDS = 3600
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

logger = logging.getLogger("hf_qlora_fsdp")


class CacheWriter:
    """Writes the tensors that this rank makes.

    Args:
        staging (`Path`): The folder to write in. It exists.
        final (`Path`): Its name when it is whole.
        manifest (`dict`): What stands in the manifest beside checksums and sizes.
        num_writers (`int`): Ranks that write to the folder.
        number (`int`): Which of them this one is.
    """

    def __init__(self, staging: Path, final: Path, manifest: dict[str, Any], num_writers: int, number: int) -> None:
        self.staging, self.final, self.manifest = staging, final, manifest
        self.num_writers, self.number = num_writers, number
        self.checksums: dict[str, list[int]] = {}
        self.offsets: dict[str, int] = {}
        self.queue: deque[tuple[str, torch.Tensor]] = deque()
        self.queued_bytes = self.budget_bytes = 0
        self.state = threading.Condition()
        self.complete = self.stopped = False
        self.thread = threading.Thread(target=self._run, name="shard cache", daemon=True)

    @contextlib.contextmanager
    def writing(self, tensors: dict[str, torch.Tensor], budget_bytes: int) -> Iterator[None]:
        """Take tensors in this context; afterwards finish in the background, or drop everything after an error.

        Args:
            tensors (`dict[str, torch.Tensor]`): What will come, for its shapes and dtypes.
            budget_bytes (`int`): Host memory for what waits to be written.
        """
        self.header = self._lay_out(tensors)
        self.budget_bytes = budget_bytes
        self.thread.start()
        try:
            yield
        except BaseException:
            self._stop()
            self.thread.join()
            discard(self.staging)
            raise
        with self.state:
            self.complete = True
            self.state.notify_all()
        _FINISHING.append(self.thread)

    def put(self, made: dict[str, torch.Tensor]) -> None:
        """Have tensors written. Waits while too many others are waiting."""
        for name, tensor in made.items():
            host = tensor.detach().cpu()
            with self.state:
                while self.queue and self.queued_bytes + host.nbytes > self.budget_bytes:
                    self.state.wait()
                if self.stopped:
                    return
                self.queue.append((name, host))
                self.queued_bytes += host.nbytes
                self.state.notify_all()
                if tensor.device.type == "cpu":
                    self.state.wait_for(lambda: self.stopped or not self.queue)

    def _lay_out(self, tensors: dict[str, torch.Tensor]) -> bytes:
        """Return the header of the file, and remember where each tensor goes.

        Source:
            https://huggingface.co/docs/safetensors/index#format: 8 bytes of header length, JSON, data.
        """
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            self.offsets[name] = end
            end += tensor.nbytes
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self.offsets[name], end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        self.offsets = {name: len(header) + offset for name, offset in self.offsets.items()}
        return header

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._stop()
            if discard(self.staging):
                logger.warning("The shard cache %s was not written: %s. The load goes on.", self.final, error)

    def _write(self) -> None:
        path = self.staging / f"rank-{self.number}.safetensors"
        with path.open("xb", buffering=0) as file:
            write_at(file.fileno(), self.header, 0)
            while (waiting := self._next()) is not None:
                name, tensor = waiting
                self._write_tensor(file.fileno(), name, tensor)
                with self.state:
                    if self.stopped:
                        return
                    self.queue.popleft()
                    self.queued_bytes -= tensor.nbytes
                    self.state.notify_all()
                del tensor, waiting
            if not self.complete:
                return
            assert set(self.checksums) == set(self.offsets), "every tensor that was announced has been put"
            os.fsync(file.fileno())
        self._publish({"bytes": path.stat().st_size, "checksums": self.checksums})

    def _next(self) -> tuple[str, torch.Tensor] | None:
        with self.state:
            self.state.wait_for(lambda: self.queue or self.complete or self.stopped)
            return self.queue[0] if self.queue and not self.stopped else None

    def _write_tensor(self, descriptor: int, name: str, tensor: torch.Tensor) -> None:
        view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.checksums[name] = []
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self.checksums[name].append(zlib.crc32(block))
            write_at(descriptor, block, self.offsets[name] + start)

    def _publish(self, done: dict[str, Any]) -> None:
        """Say that this rank is done; if all are, give the folder its name."""
        own = self.staging / f"rank-{self.number}.json"
        own.with_suffix(".part").write_text(json.dumps(done))
        os.rename(own.with_suffix(".part"), own)
        reports = [self.staging / f"rank-{number}.json" for number in range(self.num_writers)]
        if not all(report.exists() for report in reports):
            return
        parts = [json.loads(report.read_text()) for report in reports]
        manifest = {
            **self.manifest,
            "written_at": time.time(),
            "files": {f"rank-{number}.safetensors": part["bytes"] for number, part in enumerate(parts)},
            "checksums": {name: sums for part in parts for name, sums in part["checksums"].items()},
        }
        try:
            with (self.staging / MANIFEST).open("x") as file:
                file.write(json.dumps(manifest, indent=1))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:  # two ranks were last, and the other one was first
            return
        flush(self.staging)
        try:
            os.rename(self.staging, self.final)
        except OSError:
            if not self.final.is_dir():
                raise
            discard(self.staging)  # another run has written the same
            return
        flush(self.final.parent)
        for report in reports:  # not before the renaming: who finds one missing has to find the folder gone
            (self.final / report.name).unlink(missing_ok=True)

    def _stop(self) -> None:
        with self.state:
            self.stopped = True
            self.queue.clear()
            self.state.notify_all()


_FINISHING: list[threading.Thread] = []


def finish_writing() -> None:
    """Wait until this process's part of every cache is on disk. Happens by itself when the process ends."""
    while _FINISHING:
        _FINISHING.pop().join()


# Unlike atexit, this holds for processes of `multiprocessing`, too.
Finalize(None, finish_writing, exitpriority=0)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place in a file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def discard(folder: Path) -> bool:
    """Remove a folder so that nobody sees half of it; return whether it was this call that did."""
    aside = folder.with_name(f".removed-{secrets.token_hex(8)}")
    try:
        os.rename(folder, aside)
    except OSError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def clear_leftovers(root: Path) -> None:
    """Remove what killed runs have left. A live one writes all the time, so an hour of silence tells them apart."""
    for pattern in _LEFTOVERS:
        for folder in root.glob(pattern):
            with contextlib.suppress(OSError):  # somebody else removes it, or goes on writing
                last = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
                if time.time() - last > _DEAD_AFTER_SECONDS:
                    discard(folder)

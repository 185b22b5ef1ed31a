"""Host memory for shards that do not lie on the accelerator: pinned, pageable, or in a file.

    pinned     page-locked: the accelerator copies from it by itself, at the full rate of the link. Never swapped out.
    pageable   ordinary memory: the operating system may swap it out.
    mapped     a file that is mapped into memory. Its pages are written once, while the model is loaded; from then on
               they are clean, so the kernel drops them whenever memory is short and reads them again, without swap.

All three hand out regions of exactly the size asked for. (PyTorch's own pinned allocator rounds each one up to a power
of two: 64 MB for the 33 MB of a 70B model's query weight.)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import sys
import tempfile
import weakref
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from ..ranks import log_once, rank, world_size
from ..units import format_bytes

_FORMAT = 1
_LIBC = ctypes.CDLL(None)
_READ_AHEAD_BYTES = 128 << 10
"""What Linux reads of a file at one request, unless a disk's `read_ahead_kb` says more; the rest it would ignore."""


class HostMemory:
    """Ordinary memory."""

    @property
    def is_reused(self) -> bool:
        """Whether an earlier run has left in it what this one would write."""
        return False

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return a new region, all zeros, as a tensor `[num_bytes]` of bytes."""
        return _map_memory(num_bytes)[1]

    def fill(self, stretch: torch.Tensor, content: torch.Tensor) -> None:
        """Copy bytes, from any device, to a stretch of the region that was made last."""
        stretch.copy_(content)

    def seal(self) -> None:
        """Take note that the regions handed out so far are filled."""

    def finish(self) -> None:
        """Take note that everything is filled."""


class PinnedMemory(HostMemory):
    """Page-locked memory, registered with CUDA."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        mapping, region = _map_memory(num_bytes, _PinnedMapping)
        if mapping is None:
            return region
        with contextlib.suppress(OSError):  # a hint; kernels without huge pages refuse it
            mapping.madvise(mmap.MADV_HUGEPAGE)
        mapping.madvise(mmap.MADV_DONTFORK)  # a data loader's worker has no use for it
        cudart: Any = torch.cuda.cudart()
        error = cudart.cudaHostRegister(region.data_ptr(), num_bytes, 0)
        if int(error) != 0:
            raise ValueError(
                f"{format_bytes(num_bytes)} of host memory could not be pinned ({error}); "
                f"{format_bytes(psutil.virtual_memory().available)} are available on this host, less if a container "
                "limits it. Write cpu_offload_pin_memory=False, or cpu_offload_dir=PATH."
            )
        mapping.unregister = partial(cudart.cudaHostUnregister, region.data_ptr())
        return region


class _PinnedMapping(mmap.mmap):
    """A mapping that goes when the last tensor on it does, and must not be registered any more by then.

    The callback of a weak reference would come too late: an `mmap` unmaps first and calls it afterwards, when the
    addresses may belong to somebody else.
    """

    unregister: Callable[[], Any] | None = None

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.unregister is not None and not is_finalizing():  # CUDA goes before Python does
            self.unregister()


class MappedFile(HostMemory):
    """A file of this rank without a name, mapped region by region.

    Nobody can find it stale, and its space is free again when the process ends, however it ends.

    Args:
        folder (`Path`): Where the file lies.
    Raises:
        ValueError: The folder is missing or cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self._unsealed: list[mmap.mmap] = []
        if not folder.is_dir():
            raise ValueError(
                f"cpu_offload_dir={str(folder)!r} is no folder, so there is nowhere to put the shards. Make it, on a "
                "local disk, or name another."
            )
        _warn_of_memory_file_system(folder)
        try:
            self.file: Any = self._open()
            weakref.finalize(self, self.file.close)
        except OSError as error:
            raise ValueError(
                f"cpu_offload_dir={str(folder)!r}: no file can be opened there ({error}). Name a folder that you may "
                "write to."
            ) from error

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        self._reserve(self.size, num_bytes)
        mapping = mmap.mmap(self.file.fileno(), num_bytes, offset=self.size)
        self._unsealed.append(mapping)
        self.size += _whole_pages(num_bytes)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    def seal(self) -> None:
        try:
            for mapping in self._unsealed:
                mapping.flush()  # written now, its pages are clean
        except OSError as error:
            raise ValueError(
                f"cpu_offload_dir={str(self.folder)!r}: what was written there did not reach the disk "
                f"({error.strerror}). Name a folder on another one."
            ) from error
        self._unsealed.clear()

    def _open(self) -> Any:
        return tempfile.TemporaryFile(dir=self.folder)

    def _reserve(self, start: int, num_bytes: int) -> None:
        """Make room on the disk; without it, a full one would kill the process when a page is written."""
        try:
            os.posix_fallocate(self.file.fileno(), start, num_bytes)
        except OSError as error:
            raise ValueError(
                f"cpu_offload_dir={str(self.folder)!r} has no room for this rank's shards: {format_bytes(num_bytes)} "
                f"more were needed after {format_bytes(start)}, and "
                f"{format_bytes(psutil.disk_usage(str(self.folder)).free)} are free ({error.strerror}). Free some, or "
                "name a folder on a larger disk."
            ) from error


class KeptFile(MappedFile):
    """A mapped file that stays, beside a manifest that says what was written where, with checksums.

    The next run with the same weights on as many ranks finds in it what it would write, compares, and writes nothing.
    A file that a run did not finish is ours by its manifest, too, and is written anew.

    Raises:
        ValueError: The file is in use, changed, or holds other weights.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"shards-{rank():05d}-of-{world_size():05d}.bin"
        self.manifest = self.path.with_suffix(".json")
        self.written: list[list[int]] = []
        """Place in the file, bytes, and checksum of each content."""
        self.saved: list[list[int]] | None = None
        """What the manifest says these were, if the file is used again."""
        self._region_starts = (0, 0)
        super().__init__(folder)

    @property
    def is_reused(self) -> bool:
        return self.saved is not None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        start = self.size
        region = super().allocate(num_bytes)
        self._region_starts = (start, region.data_ptr())
        return region

    def fill(self, stretch: torch.Tensor, content: torch.Tensor) -> None:
        content = content.cpu()
        in_file, in_memory = self._region_starts  # a unit is filled before the next one's region is made
        entry = [in_file + stretch.data_ptr() - in_memory, content.numel(), zlib.crc32(content.numpy().data)]
        self.written.append(entry)
        if self.saved is None:
            super().fill(stretch, content)
            return
        before = self.saved[len(self.written) - 1] if len(self.written) <= len(self.saved) else None
        if before is None or entry[:2] != before[:2]:
            self._refuse("it holds the shards of another model")
        if entry != before:
            self._refuse("it holds other weights")
        read_ahead(stretch)
        if not torch.equal(stretch, content):
            self._refuse("its bytes are not those that were written, as if its disk were broken")

    def finish(self) -> None:
        if self.saved is None:
            os.fsync(self.file.fileno())
            self._write_manifest(self.written)
        elif len(self.saved) != len(self.written):
            self._refuse("it holds the shards of another model")

    def _open(self) -> Any:
        with contextlib.ExitStack() as on_error:
            file = on_error.enter_context(os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._refuse("another run is using it")
            if _describe(self.path)["size"]:
                self.saved = self._read_manifest()
            if self.saved is not None:
                log_once("The shards in %s are used again.", self.folder)
            else:
                self._write_manifest(None)
                file.truncate(0)
            on_error.pop_all()
        return file

    def _write_manifest(self, written: list[list[int]] | None) -> None:
        """Say what is in the file, `None` for what is not finished."""
        staged = self.manifest.with_suffix(".staged")
        staged.write_text(json.dumps({"format": _FORMAT, "written": written, **_describe(self.path)}))
        staged.replace(self.manifest)

    def _read_manifest(self) -> list[list[int]] | None:
        """Return what was written, `None` if that was not finished."""
        if not self.manifest.exists():
            self._refuse("no manifest says what is in it, so it is not ours")
        try:
            saved = json.loads(self.manifest.read_text())
            file_format, written = saved["format"], saved.get("written")
            described = {name: saved.get(name) for name in ("size", "mtime_ns")}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._refuse(f"its manifest {self.manifest.name} cannot be read")
        if file_format != _FORMAT:
            self._refuse("another version of this package wrote it")
        if written is not None and _describe(self.path) != described:
            self._refuse("it was changed after its manifest was written")
        return written

    def _reserve(self, start: int, num_bytes: int) -> None:
        if self.saved is None:
            try:
                super()._reserve(start, num_bytes)
            except ValueError:  # what is there so far is of no use, and fills the disk
                self.path.unlink(missing_ok=True)
                self.manifest.unlink(missing_ok=True)
                raise
        elif start + num_bytes > _describe(self.path)["size"]:
            self._refuse("it holds the shards of another model")

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f"{str(self.path)!r} cannot be used for offloading: {why}. Delete it if nobody needs it, or name another "
            "cpu_offload_dir."
        )


def read_ahead(region: torch.Tensor) -> None:
    """Ask the system for a region that is about to be read, all of it at once: of what is in swap or in a file alone,
    it would fetch a few pages each time that one is missed.

    Args:
        region (`torch.Tensor`): A region that was allocated here, or its beginning, on the host.
    """
    start, num_bytes = region.data_ptr(), region.numel()
    for offset in range(0, num_bytes, _READ_AHEAD_BYTES):
        length = min(_READ_AHEAD_BYTES, num_bytes - offset)
        _LIBC.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def _map_memory(num_bytes: int, kind: type = mmap.mmap) -> tuple[Any, torch.Tensor]:
    """Map fresh zeros; a mapping begins at a page and has the size asked for."""
    if not num_bytes:
        return None, torch.empty(0, dtype=torch.uint8)
    mapping = kind(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mapping, torch.frombuffer(mapping, dtype=torch.uint8)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _describe(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _warn_of_memory_file_system(folder: Path) -> None:
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    if kind in ("tmpfs", "ramfs"):
        log_once(
            "cpu_offload_dir=%s is a %s, which is host memory itself: nothing is saved by it. Name a folder on a disk.",
            folder,
            kind,
        )

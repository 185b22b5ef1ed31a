"""Hosts that are made small: control groups that limit memory, and swap files. Both take root.

What is made here is removed again, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_qlora_fsdp.units import format_bytes


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that limits the memory of what runs in it.

    Args:
        folder (`Path`): Where the kernel shows it.
        peak_file (`str`): Its file with the most that was in use, cached pages of files included.
    """

    folder: Path
    peak_file: str

    def enter(self, command: list[str]) -> list[str]:
        """Return a command that runs another inside."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *command]

    def peak_bytes(self) -> int | None:
        """Return the most that was in use, where the kernel says it (from Linux 5.19 on in version 2)."""
        file = self.folder / self.peak_file
        return int(file.read_text()) if file.exists() else None


@contextlib.contextmanager
def limited_memory(memory_bytes: int, swap_bytes: int) -> Iterator[MemoryGroup]:
    """Make a control group with so much memory and swap, and remove it.

    Source:
        https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    folder = (root if second else root / "memory") / f"hf-qlora-fsdp-{os.getpid()}"
    if second:
        limits = {"memory.max": memory_bytes, "memory.swap.max": swap_bytes}
    else:  # the second limit is of both together, and missing where swap is not counted
        limits = {"memory.limit_in_bytes": memory_bytes, "memory.memsw.limit_in_bytes": memory_bytes + swap_bytes}
    try:
        if second:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        for name, value in limits.items():
            if "memsw" in name and not (folder / name).exists():
                print("This kernel does not count swap by group: it is limited by what the host has.", flush=True)
            else:
                (folder / name).write_text(str(value))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise SystemExit(
            f"Host memory cannot be limited here: {error}. Control groups are made by root, on a machine or in a "
            "container where /sys/fs/cgroup is writable. Run as root there, or leave such rows out."
        ) from error
    try:
        yield MemoryGroup(folder, "memory.peak" if second else "memory.max_usage_in_bytes")
    finally:
        for _ in range(100):  # processes that were just ended leave it in their own time
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
        else:
            print(f"{folder} could not be removed: something still runs in it.", file=sys.stderr)


@contextlib.contextmanager
def swap_file(folder: Path, num_bytes: int) -> Iterator[None]:
    """Make a swap file, use it, and remove it."""
    file = folder / f"hf-qlora-fsdp-{os.getpid()}.swap"
    try:
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        file.chmod(0o600)
        for command in (["mkswap", str(file)], ["swapon", str(file)]):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        file.unlink(missing_ok=True)
        said = getattr(error, "stderr", None) or error
        raise SystemExit(
            f"A swap file of {format_bytes(num_bytes)} cannot be used in {folder}: {said}. It takes root, room, and a "
            "local disk (ext4 or xfs, not an overlay of a container). Name another folder with --swap-dir."
        ) from error
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(file)], check=False)
        file.unlink(missing_ok=True)

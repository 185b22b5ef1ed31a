"""Is the host what it should be? What is left of its memory, what may be pinned, and room on the disks.

As in `software_checks.py`, each check yields findings and tries the real thing: memory is pinned, a file is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..units import format_bytes
from .findings import Finding, error, note, ok, warning

_GIB = 2**30
_PINNED_BYTES = 256 * 2**20
LOW_BYTES = 20 * _GIB
"""A model of 8B takes 16 GB in 16 bits and 6 GB as shards; less room than that is soon full."""

_IN_MEMORY = ("tmpfs", "ramfs")


def check_memory() -> Iterator[Finding]:
    """How much memory has the host, and does a container limit it?"""
    import psutil

    from ..host import find_limits, free_memory_bytes
    from ..launch import default_num_processes

    total, swap = psutil.virtual_memory().total, psutil.swap_memory()
    free = free_memory_bytes(with_swap=False)
    limits = [limit.memory_bytes for limit in find_limits()]
    said = f"{format_bytes(free)} of {format_bytes(total)} can still be filled"
    if limits and min(limits) < psutil.virtual_memory().available:
        said += f"; a control group (container, Slurm) leaves {format_bytes(max(0, min(limits)))}"
    processes = default_num_processes()
    if free < 2 * _GIB * processes:
        yield warning(
            f"{said}.",
            f"Each of {processes} processes takes 1 GiB for its libraries, and more while it reads a model.",
            "Free some, raise the limit of the container (docker run --memory, Slurm --mem), or use fewer processes",
        )
    else:
        yield ok(f"{said}.")
    yield (
        ok(f"swap: {format_bytes(swap.free)} of {format_bytes(swap.total)} free")
        if swap.total
        else note(
            "There is no swap.",
            "Where memory runs out, the kernel ends a process at once (exit code -9).",
            "If a run comes near the limit: fallocate -l 32G /swapfile, chmod 600, mkswap and swapon /swapfile",
        )
    )


def check_locked_memory() -> Iterator[Finding]:
    """May memory be pinned, as offloading does?"""
    import resource

    import torch

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    said = "no limit" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    if torch.cuda.is_available():
        from ..offloading.host_memory import PinnedMemory

        torch.cuda.init()
        try:
            started = time.perf_counter()
            PinnedMemory().allocate(_PINNED_BYTES)
            rate = format_bytes(_PINNED_BYTES / (time.perf_counter() - started))
        except ValueError as problem:
            yield warning(
                f"{format_bytes(_PINNED_BYTES)} could not be pinned (ulimit -l: {said}): {problem}",
                "cpu_offload=True pins the shards on the host, so that copies overlap with computing.",
                "Raise the limit (ulimit -l unlimited; docker run --ulimit memlock=-1), or write "
                "cpu_offload_pin_memory=False",
            )
            return
        yield ok(f"pinned memory works, at {rate}/s; limit of locked memory (ulimit -l): {said}")
    else:
        yield ok(f"limit of locked memory (ulimit -l): {said}")
    if soft != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        yield warning(
            f"Locked memory is limited to {said}, and there is InfiniBand.",
            "Its buffers are locked memory: NCCL between machines fails with 'Cannot allocate memory'.",
            "ulimit -l unlimited; docker run --ulimit memlock=-1",
        )


def check_shared_memory() -> Iterator[Finding]:
    """Is /dev/shm large enough?"""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        fix = "docker run --ipc=host"
        yield warning("There is no /dev/shm.", "NCCL and data loaders hand data over in it.", fix)
        return
    total, _, free = shutil.disk_usage(folder)
    said = f"/dev/shm: {format_bytes(free)} of {format_bytes(total)} free"
    if free < 0.5 * _GIB:
        yield warning(
            said,
            "NCCL without peer access and the workers of data loaders hand data over in it; they fail with 'No space "
            "left on device' or 'Bus error'. docker gives 64 MiB unless told otherwise.",
            "docker run --shm-size=8g, or --ipc=host",
        )
    else:
        yield ok(said)


def check_disks() -> Iterator[Finding]:
    """Can each folder be written to, and how much fits?"""
    for purpose, folder, remedy in _folders():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        said = f"{purpose}: {folder}"
        try:
            if not existing.is_dir():
                raise NotADirectoryError(f"{existing} is a file")
            with tempfile.TemporaryFile(dir=existing):
                pass
            free = shutil.disk_usage(existing).free
        except OSError as problem:
            yield error(f"{said} cannot be written to: {problem}", "Runs write there.", remedy)
            continue
        kind = _filesystem(existing)
        said += f", {format_bytes(free)} free{f' ({kind})' if kind else ''}"
        if free < LOW_BYTES:
            why = "A checkpoint of a model of 8B has 16 GB, its shards have 6, and a full disk ends a run."
            yield warning(said, why, remedy)
        elif kind in _IN_MEMORY:
            yield warning(said, "It lies in memory, which what is written there takes from the run.", remedy)
        else:
            yield ok(said)


def _folders() -> Iterator[tuple[str, Path, str]]:
    """Yield what each folder is for, where it is, and how to have another one.

    Source:
        `huggingface_hub.constants.HF_HOME` and `shard_cache.choose_folder`, which cannot be asked where imports fail.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser().absolute()
    yield "models and data sets (HF_HOME)", home, "Make room, or export HF_HOME=FOLDER on a larger disk"
    models = os.environ.get("HF_HUB_CACHE")
    if models:
        yield "models (HF_HUB_CACHE)", Path(models).expanduser().absolute(), "Make room, or choose a larger disk"
    shards = os.environ.get("HF_QLORA_FSDP_SHARD_CACHE_DIR", os.path.join(home, "hf_qlora_fsdp", "shards"))
    if shards:  # empty: there shall be none
        remedy = "Make room, or export HF_QLORA_FSDP_SHARD_CACHE_DIR=FOLDER on a larger disk, or empty for no cache"
        yield "shard cache", Path(shards).expanduser().absolute(), remedy
    yield "working directory", Path.cwd(), "Make room, or write an output_dir on a larger disk"


def _filesystem(folder: Path) -> str:
    """Return the type of the file system that a folder lies on, `""` if unknown."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, mount, this, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and folder.resolve().is_relative_to(mount):
            best, kind = mount, this
    return kind

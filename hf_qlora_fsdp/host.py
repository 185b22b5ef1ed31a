"""What this host has left for us: its own free memory, or less where a container limits it.

A limit of a control group (docker's `--memory`, Slurm's, systemd's) is not seen in `/proc/meminfo`. Whoever goes by
that alone loads for half an hour and is killed without a word.

Source:
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files,
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 says "none" by a number near 2**63


@dataclass(frozen=True)
class MemoryLimit:
    """What a control group leaves, in bytes.

    Args:
        memory_bytes (`int`): Limit less what is in use and cannot be dropped. Cached pages of files can.
        swap_bytes (`int`): What it may still swap out; `_NO_LIMIT` or more if as much as the host can.
    """

    memory_bytes: int
    swap_bytes: int


def free_memory_bytes(*, with_swap: bool) -> int:
    """Return how many bytes processes of this host, or of this container, can still fill.

    Args:
        with_swap (`bool`): Whether memory that is swapped out is of use. Pinned memory is not.
    """
    swap = psutil.swap_memory().free if with_swap else 0
    free = psutil.virtual_memory().available + swap
    for limit in find_limits():
        free = min(free, limit.memory_bytes + min(swap, limit.swap_bytes))
    return max(0, free)


def find_limits(processes: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> list[MemoryLimit]:
    """Return the limits of the control groups that this process is in, the group's own and those around it.

    Args:
        processes (`Path`): Where the kernel lists the groups.
        root (`Path`): Where they are mounted.
    """
    try:
        lines = processes.read_text().splitlines()
    except OSError:
        return []  # not Linux
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += [_read_version_2(folder) for folder in _upwards(root, path)]
        elif "memory" in controllers.split(","):
            limits += [_read_version_1(folder) for folder in _upwards(root / "memory", path)]
    return [limit for limit in limits if limit is not None and limit.memory_bytes < _NO_LIMIT]


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a group and of those around it. In a container, `root` itself may be the group's."""
    folder = root / path.lstrip("/")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def _read_version_2(folder: Path) -> MemoryLimit | None:
    limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
    if limit is None or used is None:
        return None
    cached = _read_cached(folder / "memory.stat", ("active_file", "inactive_file"))
    swap_limit, swapped = _read(folder / "memory.swap.max"), _read(folder / "memory.swap.current")
    return MemoryLimit(limit - used + cached, (_NO_LIMIT if swap_limit is None else swap_limit) - (swapped or 0))


def _read_version_1(folder: Path) -> MemoryLimit | None:
    limit, used = _read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    cached = _read_cached(folder / "memory.stat", ("total_active_file", "total_inactive_file"))
    both_limit, both_used = _read(folder / "memory.memsw.limit_in_bytes"), _read(folder / "memory.memsw.usage_in_bytes")
    swap = _NO_LIMIT if both_limit is None else (both_limit - limit) - ((both_used or used) - used)
    return MemoryLimit(limit - used + cached, swap)


def _read(file: Path) -> int | None:
    """Return the number in a file, `None` if there is no file; "max" is a number beyond any other."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return _NO_LIMIT * 2 if text == "max" else int(text)


def _read_cached(file: Path, names: tuple[str, ...]) -> int:
    try:
        pairs = dict(line.split() for line in file.read_text().splitlines())
    except OSError:
        return 0
    return sum(int(pairs.get(name, 0)) for name in names)

"""What a container leaves is what counts."""

from __future__ import annotations

from pathlib import Path

import psutil

from hf_qlora_fsdp import host
from hf_qlora_fsdp.host import MemoryLimit, find_limits, free_memory_bytes


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def listed(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_version_2_counts_every_group_above(tmp_path):
    root = tmp_path / "fs"
    write(root, memory__stat="")
    write(root / "slurm", memory__max="1000", memory__current="400", memory__stat="anon 1\nactive_file 30\n")
    write(
        root / "slurm/job",
        memory__max="700",
        memory__current="100",
        memory__stat="inactive_file 20\nactive_file 5",
        memory__swap__max="50",
        memory__swap__current="10",
    )
    first, second = find_limits(listed(tmp_path, "0::/slurm/job\n"), root)
    assert first == MemoryLimit(625, 40)
    assert second.memory_bytes == 630 and second.swap_bytes >= 1 << 60


def test_version_2_in_a_container_whose_group_is_the_root(tmp_path):
    write(tmp_path / "fs", memory__max="1000", memory__current="400", memory__stat="")
    assert find_limits(listed(tmp_path, "0::/../../docker/abc\n"), tmp_path / "fs")[-1].memory_bytes == 600
    assert find_limits(listed(tmp_path, "0::/\n"), tmp_path / "fs")[0].memory_bytes == 600


def test_no_limit_is_none(tmp_path):
    write(tmp_path / "fs", memory__max="max", memory__current="400", memory__stat="")
    assert find_limits(listed(tmp_path, "0::/\n"), tmp_path / "fs") == []
    assert find_limits(tmp_path / "nothing", tmp_path / "fs") == []


def test_version_1(tmp_path):
    write(
        tmp_path / "fs/memory/job",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="300",
        memory__stat="total_inactive_file 40\n",
        memory__memsw__limit_in_bytes="1500",
        memory__memsw__usage_in_bytes="350",
    )
    (limit,) = find_limits(listed(tmp_path, "4:cpu,memory:/job\n2:pids:/job\n"), tmp_path / "fs")
    assert limit == MemoryLimit(740, 450)


def test_the_tightest_counts(monkeypatch):
    monkeypatch.setattr(host, "find_limits", lambda: [MemoryLimit(5000, 10**9), MemoryLimit(3000, 200)])
    assert free_memory_bytes(with_swap=False) == 3000
    assert free_memory_bytes(with_swap=True) == 3000 + min(200, psutil.swap_memory().free)
    monkeypatch.setattr(host, "find_limits", lambda: [MemoryLimit(-5, 0)])
    assert free_memory_bytes(with_swap=False) == 0

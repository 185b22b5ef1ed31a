"""One step under torch's profiler, as text: the longest kernels, the Python, and when the GPU had nothing to do.

A step is as long as what the GPU computes plus what it waits. The first table says what it computes; the gaps, with the
kernels on both sides, say where it waits; the second table says what Python was doing meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

NUM_ROWS = 40
NUM_GAPS = 20
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_", "gemv", "addmm", "aten::mm"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated"),
    "dequantise": ("dequant",),
    "nccl": ("nccl",),
    "copies": ("memcpy", "copy", "memset", "fill"),
    "optimizer": ("adam", "multi_tensor"),
}


def start_profiler() -> Any:
    """Return a profiler that runs."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profile(activities=activities).__enter__()


def write_profile(profiler: Any, file: Path, seconds: float) -> None:
    """Write what the profiler saw of one step that took so long."""
    averages = profiler.key_averages()
    lines = [f"one step under the profiler: {1e3 * seconds:,.1f} ms\n"]
    kernels = [(e.key, e.self_device_time_total / 1e3, e.count) for e in averages if "CUDA" in str(e.device_type)]
    lines += describe_kernels(kernels) + describe_gaps(profiler) + [f"\nCPU, {NUM_ROWS} longest by self time"]
    on_cpu = sorted((e for e in averages if "CPU" in str(e.device_type)), key=lambda e: -e.self_cpu_time_total)
    lines += [f"{'ms':>9} {'calls':>7}  operator"]
    lines += [f"{e.self_cpu_time_total / 1e3:9.2f} {e.count:7d}  {e.key[:110]}" for e in on_cpu[:NUM_ROWS]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:12]), flush=True)


def describe_kernels(kernels: list[tuple[str, float, int]]) -> list[str]:
    """Return the sums by kind, and the longest kernels."""
    sums: dict[str, tuple[float, int]] = {}
    for name, milliseconds, count in kernels:
        kind = kind_of(name)
        before = sums.get(kind, (0.0, 0))
        sums[kind] = before[0] + milliseconds, before[1] + count
    total = sum(milliseconds for _, milliseconds, _ in kernels)
    lines = [f"GPU, all kernels: {total:,.1f} ms in {sum(count for *_, count in kernels):,} launches"]
    lines += [
        f"{ms:9.2f} {count:7d}  {kind}" for kind, (ms, count) in sorted(sums.items(), key=lambda item: -item[1][0])
    ]
    lines += [f"\nGPU, {NUM_ROWS} longest", f"{'ms':>9} {'calls':>7}  kernel"]
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:NUM_ROWS]
    return lines + [f"{ms:9.2f} {count:7d}  {name[:110]}" for name, ms, count in longest]


def kind_of(name: str) -> str:
    """Return what kind of work a kernel does, by its name."""
    name = name.lower()
    attention = any(word in name for word in KINDS["attention"])
    for kind, words in KINDS.items():
        if any(word in name for word in words) and not (kind == "products" and attention):
            return kind
    return "elementwise and other"


def describe_gaps(profiler: Any) -> list[str]:
    """Return for how long no kernel ran, and the longest gaps with the kernels around them."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if "CUDA" in str(event.device_type)
    )
    if not spans:
        return []
    gaps, (_, busy_until, before) = [], spans[0]
    for start, end, name in spans[1:]:
        if start > busy_until:
            gaps.append((start - busy_until, before, name))
        if end > busy_until:
            busy_until, before = end, name
    idle, whole = sum(gap for gap, *_ in gaps), busy_until - spans[0][0]
    lines = [f"\nGPU idle for {idle / 1e3:,.1f} of {whole / 1e3:,.1f} ms, in {len(gaps):,} gaps; the longest"]
    for gap, first, second in sorted(gaps, reverse=True)[:NUM_GAPS]:
        lines.append(f"{gap / 1e3:9.2f}  {first[:50]} ... {second[:50]}")
    return lines

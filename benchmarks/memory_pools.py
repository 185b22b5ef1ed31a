"""Where memory that torch holds and does not use lies: which stream's, and in holes of which size.

Torch's allocator keeps what each stream has freed for that stream. So it holds more than tensors ever take together,
for two reasons: streams are fullest at different moments, and within a stream free blocks lie between others and are
too small for what is asked. With `most` a stream's peak, the first reason accounts for the sum of `most` less the most
of all together, the second for what is held less the sum of `most`.

    python benchmarks/step_profile.py config.json --seq 2048 --steps 6 --pools
"""

from __future__ import annotations

from collections import Counter
from typing import Any

MIB = 2**20
_FREED = "free_requested"


def describe_pools(before: list[dict[str, Any]], events: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Describe what happened between two snapshots of torch's allocator.

    Args:
        before (`list[dict]`), after (`list[dict]`): Their `segments`.
        events (`list[dict]`): What `_record_memory_history` has recorded between them, on one device.
    """
    alive, taken = _find_alive(before)
    most, held = Counter(taken), Counter[int]()
    most_together, clears, clearing = taken.total(), 0, False
    for segment in after:
        held[segment["stream"]] += segment["total_size"]
    for event in events:
        action, address = event["action"], event["addr"]
        if action == "alloc":
            alive[address] = event["stream"], event["size"]
            taken[event["stream"]] += event["size"]
            most[event["stream"]] = max(most[event["stream"]], taken[event["stream"]])
            most_together = max(most_together, taken.total())
        elif action == _FREED and address in alive:
            stream, size = alive.pop(address)
            taken[stream] -= size
        unmapped = action in ("segment_unmap", "segment_free")
        clears += unmapped and not clearing
        clearing = unmapped
    lines = [f"{'stream':>16} {'most MiB':>10} {'held MiB':>10}  largest holes, MiB"]
    for stream in sorted(held, key=lambda stream: -held[stream]):
        holes = " ".join(f"{size / MIB:.0f}" for size in _find_holes(after, stream)[:8])
        lines.append(f"{stream:>16} {most[stream] / MIB:>10,.0f} {held[stream] / MIB:>10,.0f}  {holes}")
    lines.append(f"{'all':>16} {most.total() / MIB:>10,.0f} {held.total() / MIB:>10,.0f}")
    lines.append(f"together at most {most_together / MIB:,.0f} MiB; memory was given back {clears} times")
    return "\n".join(lines)


def _find_alive(segments: list[dict[str, Any]]) -> tuple[dict[int, tuple[int, int]], Counter[int]]:
    """Return the stream and size of each block in use, by its address, and what each stream has in use."""
    alive: dict[int, tuple[int, int]] = {}
    taken: Counter[int] = Counter()
    for segment in segments:
        for block in segment["blocks"]:
            if block["state"].startswith("active"):
                alive[block["address"]] = segment["stream"], block["size"]
                taken[segment["stream"]] += block["size"]
    return alive, taken


def _find_holes(segments: list[dict[str, Any]], stream: int) -> list[int]:
    """Return the sizes of a stream's free blocks, the largest first."""
    blocks = (block for segment in segments if segment["stream"] == stream for block in segment["blocks"])
    return sorted((block["size"] for block in blocks if block["state"] == "inactive"), reverse=True)

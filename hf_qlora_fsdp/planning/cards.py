"""Cards and links, by name: how large, how fast, and what of them is gone before a tensor is allocated.

Figures are those of the makers, with one exception each: memory is what the driver offers to programs (`nvidia-smi`),
which is less than the name says where error correction takes its part, and links are counted at four fifths of what
they could carry, which is what large copies reach.

Source:
    NVIDIA's whitepapers of GA102 (3090), AD102 (4090) and the RTX Blackwell architecture (5090), and the data sheets of
    A10G (AWS), RTX A5000, RTX A6000, L40S, A100, H100 and H200: bfloat16 on tensor cores without sparsity, with sums in
    float32. PCI Express: 1.97 GB/s a lane in version 4, half and twice that in 3 and 5. NVLink: one direction of
    600 GB/s (A100) and 900 GB/s (H100, H200).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

MIB, GB, TFLOPS = 1 << 20, 10**9, 10**12

CONTEXT_BYTES = 540 * MIB
"""The CUDA context. Measured on an H100, torch 2.11: what is in use before anything ran."""
FIRST_USE_BYTES = 240 * MIB
"""Code of kernels, once each has run. Measured there, without NCCL: what is in use at the end, less the context."""
NCCL_BYTES = {"alone": 550 * MIB, "together": 840 * MIB}
"""NCCL's buffers, of which a rank that shares with nobody has some as well: FSDP gathers there, too. Measured on H200:
1.30 and 1.58 GiB outside of the allocator (`planner ...: outside the allocator` in `benchmarks/results.csv`), less both
of the above."""
HOLES = 0.05
"""Of what is allocated, how much more the allocator must hold for the sizes to find room: on a card that is full. One
that is not holds more, and gives it back when it has to. Measured: 70B in 23 GiB, `benchmarks/LOG.md`, holds 21.5 GiB
for 20.4. Not what `checkpoint_layers="auto"` leaves free (`speed/activation_room.LEFT_FREE`), which is a choice."""


@dataclass(frozen=True)
class Card:
    """A card.

    Args:
        name (`str`): What people call it.
        memory_bytes (`int`): What programs can have of it.
        flops (`float`): Operations a second in bfloat16.
        memory_rate (`float`): Bytes a second of its memory.
        compute_capability (`int`): Major one.
        link (`str`): What cards of this kind are joined by, where nothing else is said.
        host_link (`str`): What joins it to the host.
    """

    name: str
    memory_bytes: int
    flops: float
    memory_rate: float
    compute_capability: int
    link: str
    host_link: str


LINKS = {
    "pcie3x8": 6.3 * GB,
    "pcie3x16": 12.6 * GB,
    "pcie4x8": 12.6 * GB,
    "pcie4x16": 25.2 * GB,
    "pcie5x16": 50.4 * GB,
    "nvlink3": 240 * GB,
    "nvlink4": 360 * GB,
}
"""Bytes a second in one direction, see the module docstring."""

CARDS = {
    card.name: card
    for card in (
        Card("3090", 24576 * MIB, 71 * TFLOPS, 936 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("4090", 24564 * MIB, 165.2 * TFLOPS, 1008 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("5090", 32607 * MIB, 209.5 * TFLOPS, 1792 * GB, 12, "pcie5x16", "pcie5x16"),
        Card("A10G", 23028 * MIB, 70 * TFLOPS, 600 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("A5000", 24564 * MIB, 111.1 * TFLOPS, 768 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("A6000", 49140 * MIB, 154.8 * TFLOPS, 768 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("L40S", 46068 * MIB, 362 * TFLOPS, 864 * GB, 8, "pcie4x16", "pcie4x16"),
        Card("A100", 81920 * MIB, 312 * TFLOPS, 2039 * GB, 8, "nvlink3", "pcie4x16"),
        Card("H100", 81559 * MIB, 989.4 * TFLOPS, 3350 * GB, 9, "nvlink4", "pcie5x16"),
        Card("H200", 143771 * MIB, 989.4 * TFLOPS, 4800 * GB, 9, "nvlink4", "pcie5x16"),
    )
}


def find_card(name: str) -> Card:
    """Return a card by its name, however it is written: `"RTX 4090"`, `"NVIDIA H100 80GB HBM3"`.

    Raises:
        ValueError: It is not in the table.
    """
    words = name.upper().replace("-", " ").replace("_", " ").split()
    for known, card in CARDS.items():
        if any(word in (known, f"RTX{known}") for word in words):
            return card
    near = difflib.get_close_matches(name.upper(), CARDS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{name!r} is no card whose speed is known here.{hint} Give one of {', '.join(CARDS)}, or the nearest of them "
        "and the memory of yours (--device-memory)."
    )


def find_link(name: str) -> float:
    """Return the bytes a second of a link, given by its name or as a number with a unit: `"pcie4x16"`, `"20GB"`.

    Raises:
        ValueError: It is neither.
    """
    from ..units import parse_bytes

    if name.lower() in LINKS:
        return LINKS[name.lower()]
    try:
        return float(parse_bytes(name))
    except ValueError:
        raise ValueError(
            f"{name!r} is no link that is known here, and no number of bytes a second. Give one of {', '.join(LINKS)}, "
            "or a rate such as 20GB."
        ) from None


def outside_bytes(num_ranks: int) -> int:
    """Return what lies on a card outside of torch's allocator."""
    return CONTEXT_BYTES + FIRST_USE_BYTES + NCCL_BYTES["together" if num_ranks > 1 else "alone"]

"""The ring hands out what it is asked for, whatever the order, and learns the order."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from hf_qlora_fsdp import staging
from hf_qlora_fsdp.staging import NUM_SLOTS, StagingRing, padded_bytes, slot_bytes

CPU = torch.device("cpu")


class Unit:
    def __init__(self, number: int, sizes: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(number)
        self.regions = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.fixture
def units(monkeypatch) -> list[Unit]:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)  # several chunks a region
    return [Unit(number, (3001, 0, 17, 4096)) for number in range(8)]


@pytest.fixture
def filled(monkeypatch) -> list[object]:
    """The units that were filled into slots, in order."""
    order: list[object] = []
    fill = staging._Slot.fill
    monkeypatch.setattr(staging._Slot, "fill", lambda self, unit, *rest: (order.append(unit), fill(self, unit, *rest)))
    return order


def fetch(ring: StagingRing, unit: Unit) -> None:
    for index, region in enumerate(unit.regions):
        assert torch.equal(ring.fetch(unit, index), region)


def test_any_order_gives_the_right_bytes(units):
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    choice = random.Random(0)
    for _ in range(300):
        fetch(ring, choice.choice(units))


def test_what_is_fetched_is_a_copy_that_stays(units):
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    kept = [ring.fetch(unit, 0) for unit in units]
    assert all(torch.equal(copy, unit.regions[0]) for copy, unit in zip(kept, units, strict=True))


def test_the_second_round_is_filled_ahead(units, filled):
    """Forwards and backwards: a unit has been put into a slot before the turn is its own."""
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    steps = [*units, *reversed(units)]
    for _ in range(2):
        for unit in steps:
            fetch(ring, unit)
    filled.clear()
    for position, unit in enumerate(steps):
        fetch(ring, unit)
        ahead = [steps[(position + step) % len(steps)] for step in range(1, NUM_SLOTS)]
        assert all(any(slot.unit is later for slot in ring._slots) for later in ahead), position
    # Turning round costs nothing: the last units are still there.
    assert len(filled) < len(steps)


def test_the_order_may_change(units):
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 4, 6], [0, 0, 1, 1], [7, 6, 0, 1]):
        for _ in range(3):
            for number in order:
                fetch(ring, units[number])


def test_a_unit_that_cannot_be_read_says_so_when_it_is_needed(units):
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    broken = Unit(99, (10,))
    broken.regions[0] = torch.empty(10, dtype=torch.float16).view(torch.int16)[:0].expand(0)
    broken.regions = [torch.empty(10, dtype=torch.uint8, device="meta")]
    with pytest.raises(NotImplementedError):
        ring.fetch(broken, 0)
    fetch(ring, units[0])  # and the ring goes on


def test_threads_end_with_the_ring(units):
    before = threading.active_count()
    ring = StagingRing(CPU, max(map(slot_bytes, units)))
    fetch(ring, units[0])
    assert threading.active_count() > before
    threads = ring._threads._threads.copy()
    del ring
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_parts_are_aligned():
    assert [padded_bytes(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]

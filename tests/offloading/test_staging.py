"""The ring hands out what it is asked for, whatever the order, and learns the order."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time

import pytest
import torch

from hf_qlora_fsdp.offloading import staging
from hf_qlora_fsdp.offloading.host_memory import MappedFile, read_ahead
from hf_qlora_fsdp.offloading.staging import NUM_SLOTS, StagingRing, choose_slot_bytes

CPU = torch.device("cpu")


LARGEST = 5007


class Unit:
    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.region = torch.randint(0, 256, (5000 + number,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def units() -> list[Unit]:
    return [Unit(number) for number in range(8)]


@pytest.fixture
def filled(monkeypatch) -> list[object]:
    """The units that were filled into slots, in order."""
    order: list[object] = []
    fill = staging._Slot.fill
    monkeypatch.setattr(staging._Slot, "fill", lambda self, unit, *rest: (order.append(unit), fill(self, unit, *rest)))
    return order


def fetch(ring: StagingRing, unit: Unit) -> None:
    assert torch.equal(ring.fetch(unit), unit.region)


def test_any_order_gives_the_right_bytes(units):
    ring = StagingRing(CPU, LARGEST)
    choice = random.Random(0)
    for _ in range(300):
        fetch(ring, choice.choice(units))


def test_what_is_larger_than_a_slot_goes_in_pieces(units, filled):
    """An embedding and a head are larger than the layers, whose size slots have."""
    embedding, head, *layers = units
    for layer in layers:
        layer.region = layer.region[:2001]
    size = choose_slot_bytes(unit.region.numel() for unit in units)
    ring = StagingRing(CPU, size)
    assert [slot.room.numel() for slot in ring._slots] == [2001] * NUM_SLOTS
    choice = random.Random(1)
    for _ in range(100):
        fetch(ring, choice.choice(units))
    ring = StagingRing(CPU, size)
    for _ in range(3):
        filled.clear()
        for unit in (embedding, *layers, head, *reversed(layers)):
            fetch(ring, unit)
    assert max(part.region.numel() for part in filled) == 2001
    assert len(filled) <= 3 + len(layers) + 3 + len(layers), "nothing is filled twice: it is known what comes next"


def test_what_is_fetched_is_a_copy_that_stays(units):
    ring = StagingRing(CPU, LARGEST)
    kept = [ring.fetch(unit) for unit in units]
    assert all(torch.equal(copy, unit.region) for copy, unit in zip(kept, units, strict=True))


def test_the_second_round_is_filled_ahead(units, filled):
    """Forwards and backwards: a unit has been put into a slot before the turn is its own."""
    ring = StagingRing(CPU, LARGEST)
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
    ring = StagingRing(CPU, LARGEST)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 4, 6], [0, 0, 1, 1], [7, 6, 0, 1]):
        for _ in range(3):
            for number in order:
                fetch(ring, units[number])


def test_a_unit_that_cannot_be_read_says_so_when_it_is_needed(units):
    ring = StagingRing(CPU, LARGEST)
    broken = Unit(3)
    broken.region = torch.empty(10, dtype=torch.uint8, device="meta")
    with pytest.raises(NotImplementedError):
        ring.fetch(broken)
    fetch(ring, units[0])  # and the ring goes on


def test_threads_end_with_the_ring(units):
    ring = StagingRing(CPU, LARGEST)
    fetch(ring, units[0])
    threads = ring._thread._threads.copy()
    assert threads and all(thread.is_alive() for thread in threads)
    del ring
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_only_the_staging_thread_copies_on_several_cores(units):
    before = torch.get_num_threads()
    fetch(StagingRing(CPU, LARGEST), units[0])
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_a_slot_is_kept_until_it_was_copied_out_on_every_stream():
    """Sent twice, first on a stream that is busy: the slot is not filled with the next unit before both copies."""
    device = torch.device("cuda")
    units = [Unit(number) for number in range(NUM_SLOTS + 1)]
    ring, busy = StagingRing(device, LARGEST), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)  # half a second
        late = ring.fetch(units[0])
    early = ring.fetch(units[0])
    for unit in units[1:]:
        ring.fetch(unit)
    torch.cuda.synchronize()
    assert torch.equal(early.cpu(), units[0].region) and torch.equal(late.cpu(), units[0].region)


def count_pages_in_memory(region: torch.Tensor) -> int:
    pages = (ctypes.c_ubyte * (-(-region.numel() // mmap.PAGESIZE)))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(region.data_ptr()), ctypes.c_size_t(region.numel()), pages) == 0
    return sum(page & 1 for page in pages)


def test_reading_ahead_brings_in_a_whole_region(tmp_path):
    memory = MappedFile(tmp_path)
    region = memory.allocate(1 << 24)
    content = torch.arange(1 << 21).view(torch.uint8)
    memory.fill(region, content)
    memory.seal()
    os.fsync(memory.file.fileno())
    ctypes.CDLL(None).madvise(ctypes.c_void_p(region.data_ptr()), ctypes.c_size_t(region.numel()), mmap.MADV_DONTNEED)
    os.posix_fadvise(memory.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    num_pages = region.numel() // mmap.PAGESIZE
    if count_pages_in_memory(region) > num_pages // 10:
        pytest.skip("this file system keeps its pages in memory")
    read_ahead(region)
    deadline = time.monotonic() + 30
    while count_pages_in_memory(region) < num_pages:
        assert time.monotonic() < deadline, count_pages_in_memory(region)
        time.sleep(0.01)
    assert torch.equal(region, content)
    read_ahead(region[:0])

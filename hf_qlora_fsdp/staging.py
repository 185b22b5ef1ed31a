"""Copying from memory that is not pinned, at the speed of memory that is.

An accelerator copies by itself only from pinned memory; from any other, the driver copies into a small pinned buffer of
its own first, on the thread that asks, one piece after the other. Here a few threads do that ahead of time, into a ring
of pinned slots that each hold a unit's shards: while one unit is on its way to the accelerator, the next ones are
brought together, from memory, from swap, or from a file. A page that is on disk is waited for there, not in the
training loop.

    threads        region -> slot (pinned)      ahead, two units deep
    copy stream    slot -> accelerator          when FSDP gathers the unit; an event says when the slot is free again

Which unit comes next is what came next the last time: units are gathered in the same order in every step, forwards and
then backwards, so the last two units tell which one follows. A wrong guess costs time, never data.
"""

from __future__ import annotations

import itertools
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from .host_memory import HostMemory, PinnedMemory
from .ranks import local_world_size

NUM_SLOTS = 3  # one on its way, two being filled
CHUNK_BYTES = 8 << 20
ALIGNMENT = 512
_MAX_THREADS = 8


class StagedUnit(Protocol):
    """What is gathered together: regions `[num_bytes]` of bytes in host memory."""

    @property
    def regions(self) -> list[torch.Tensor]: ...


class _Slot:
    """Pinned room for one unit, and the copying into it and out of it."""

    def __init__(self, room: torch.Tensor) -> None:
        self.room = room
        self.unit: StagedUnit | None = None
        self.parts: list[torch.Tensor] = []
        self.copies: list[list[Future[None]]] = []
        self.copied_out: torch.cuda.Event | None = None

    def fill(self, unit: StagedUnit, threads: ThreadPoolExecutor) -> None:
        """Begin to copy a unit in, once what was here has left."""
        for copy in itertools.chain.from_iterable(self.copies):
            copy.exception()  # waits; an error belongs to the unit that was here, and nobody has asked for it
        self.unit, self.parts, self.copies = unit, [], []
        start = 0
        for region in unit.regions:
            part = self.room[start : start + region.numel()]
            pieces = zip(part.split(CHUNK_BYTES), region.split(CHUNK_BYTES), strict=True) if region.numel() else ()
            self.parts.append(part)
            self.copies.append([threads.submit(_copy, target, chunk, self.copied_out) for target, chunk in pieces])
            start += padded_bytes(region.numel())

    def send(self, index: int, device: torch.device) -> torch.Tensor:
        """Copy one region on to the device, in stream order."""
        for copy in self.copies[index]:
            copy.result()
        part = self.parts[index]
        if device.type == "cpu":
            return part.clone()
        sent = part.to(device, non_blocking=True)
        self.copied_out = self.copied_out or torch.cuda.Event()
        self.copied_out.record()
        return sent


class StagingRing:
    """A ring of pinned slots, filled ahead.

    Args:
        device (`torch.device`): Where the regions are needed.
        slot_bytes (`int`): What the largest unit takes, see `slot_bytes`. `NUM_SLOTS` times as much is pinned.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.device = device
        memory = PinnedMemory() if device.type == "cuda" else HostMemory()
        self._slots = [_Slot(memory.allocate(slot_bytes)) for _ in range(NUM_SLOTS)]
        self._last: tuple[StagedUnit | None, StagedUnit | None] = (None, None)
        self._followers: dict[tuple[StagedUnit | None, StagedUnit | None], StagedUnit] = {}
        cores = len(os.sched_getaffinity(0)) // max(1, local_world_size())
        self._threads = ThreadPoolExecutor(max(2, min(_MAX_THREADS, cores - 1)), "staging")
        weakref.finalize(self, self._threads.shutdown, wait=False)

    def fetch(self, unit: StagedUnit, index: int) -> torch.Tensor:
        """Return region `index` of a unit on the device, valid for what the current stream does from now on."""
        if unit is not self._last[1]:
            self._turn_to(unit)
        slot = next(slot for slot in self._slots if slot.unit is unit)
        return slot.send(index, self.device)

    def _turn_to(self, unit: StagedUnit) -> None:
        """Remember that this unit came next, have it filled if it is not yet, and the expected ones after it."""
        self._followers[self._last] = unit
        self._last = (self._last[1], unit)
        wanted, pair = [unit], self._last
        while len(wanted) < NUM_SLOTS and (follower := self._followers.get(pair)) is not None:
            wanted.append(follower)
            pair = (pair[1], follower)
        for expected in wanted:
            if not any(slot.unit is expected for slot in self._slots):
                spare = next(slot for slot in self._slots if not any(slot.unit is other for other in wanted))
                self._slots.remove(spare)
                self._slots.append(spare)  # the one filled longest ago is at the front
                spare.fill(expected, self._threads)


def padded_bytes(num_bytes: int) -> int:
    """Return how much of a slot a region takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def slot_bytes(unit: StagedUnit) -> int:
    """Return how large a slot for this unit is."""
    return sum(padded_bytes(region.numel()) for region in unit.regions)


def _copy(target: torch.Tensor, source: torch.Tensor, free: torch.cuda.Event | None) -> None:
    if free is not None:
        free.synchronize()
    target.copy_(source)

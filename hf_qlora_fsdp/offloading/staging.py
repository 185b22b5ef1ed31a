"""Copying from memory that is not pinned, at the speed of memory that is.

An accelerator copies by itself only from pinned memory; from any other, the driver copies into a small pinned buffer of
its own first, on the thread that asks, one piece after the other. Here a thread does that ahead of time, into a ring of
pinned slots that each hold a unit's shards: while one unit is on its way to the accelerator, the next ones are brought
in, from memory, from swap, or from a file. A page that is on disk is waited for there, not in the training loop.

    thread         region -> slot (pinned)      ahead, two units deep, on several cores
    copy stream    slot -> accelerator          when FSDP gathers the unit; an event says when the slot is free again

A unit is one call into PyTorch, which copies on several cores and needs Python's lock only to begin and to end: the
training loop holds that lock nearly all the time. Slots have the size of a layer. What is larger, an embedding or a
head, goes through them in pieces: three slots for the head of a 405B model would pin 6.3 GB on each rank.

Which unit comes next is what came next the last time: units are gathered in the same order in every step, forwards and
then backwards, so the last two units tell which one follows. A wrong guess costs time, never data.
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from ..ranks import share_of_cores
from .host_memory import HostMemory, PinnedMemory, read_ahead

NUM_SLOTS = 3  # one on its way, two being filled
_MAX_CORES = 8  # more do not copy faster


class StagedUnit(Protocol):
    """What is gathered together: a region `[num_bytes]` of host memory."""

    region: torch.Tensor


def choose_slot_bytes(sizes: Iterable[int]) -> int:
    """Return the size of a slot for regions of these sizes: that of most of them, which are layers."""
    return statistics.median_high([size for size in sizes if size] or [1])


class Piece:
    """A stretch of a region that is larger than a slot.

    Args:
        region (`torch.Tensor`): The stretch.
    """

    def __init__(self, region: torch.Tensor) -> None:
        self.region = region


class _Slot:
    """Pinned room for one unit, and the copying into it and out of it."""

    def __init__(self, room: torch.Tensor) -> None:
        self.room = room
        self.unit: StagedUnit | None = None
        self.filled: Future[None] | None = None
        self.copied_out: torch.cuda.Event | None = None

    def fill(self, unit: StagedUnit, thread: ThreadPoolExecutor) -> None:
        """Have a unit copied in, once what was here has left."""
        self.unit = unit
        self.filled = thread.submit(_copy, self.room[: unit.region.numel()], unit.region, self.copied_out)

    def send(self, device: torch.device, target: torch.Tensor) -> None:
        """Copy the unit on to the device, in stream order."""
        assert self.unit is not None and self.filled is not None
        self.filled.result()
        target.copy_(self.room[: self.unit.region.numel()], non_blocking=True)
        if device.type == "cpu":
            return
        if self.copied_out is None:
            self.copied_out = torch.cuda.Event()
        else:  # a unit that is sent twice may be sent on two streams, and the slot is free when both copies are done
            torch.cuda.current_stream(device).wait_event(self.copied_out)
        self.copied_out.record()


class StagingRing:
    """A ring of pinned slots, filled ahead.

    Args:
        device (`torch.device`): Where the units are needed.
        slot_bytes (`int`): Size of a slot, see `choose_slot_bytes`. `NUM_SLOTS` times as much is pinned.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.device, self.slot_bytes = device, slot_bytes
        memory = PinnedMemory() if device.type == "cuda" else HostMemory()
        self._slots = [_Slot(memory.allocate(slot_bytes)) for _ in range(NUM_SLOTS)]
        self._pieces: dict[StagedUnit, list[Piece]] = {}
        self._last: tuple[StagedUnit | None, StagedUnit | None] = (None, None)
        self._followers: dict[tuple[StagedUnit | None, StagedUnit | None], StagedUnit] = {}
        cores = max(1, min(_MAX_CORES, share_of_cores() - 1))
        # The number of threads is a setting of each thread: that of threads which are there already stays.
        self._thread = ThreadPoolExecutor(1, "staging", torch.set_num_threads, (cores,))
        weakref.finalize(self, self._thread.shutdown, wait=False)

    def fetch(self, unit: StagedUnit) -> torch.Tensor:
        """Return a unit's region on the device, valid for what the current stream does from now on."""
        arrived = torch.empty_like(unit.region, device=self.device)
        if unit.region.numel() <= self.slot_bytes:
            self._fetch(unit, arrived)
            return arrived
        if unit not in self._pieces:
            self._pieces[unit] = [Piece(part) for part in unit.region.split(self.slot_bytes)]
        for piece, target in zip(self._pieces[unit], arrived.split(self.slot_bytes), strict=True):
            self._fetch(piece, target)
        return arrived

    def _fetch(self, unit: StagedUnit, target: torch.Tensor) -> None:
        """Copy what fits into a slot, and have what comes next filled in meanwhile."""
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
                self._slots.append(spare)  # the one filled longest ago is in front
                spare.fill(expected, self._thread)
        next(slot for slot in self._slots if slot.unit is unit).send(self.device, target)


def _copy(target: torch.Tensor, source: torch.Tensor, free: torch.cuda.Event | None) -> None:
    read_ahead(source)
    if free is not None:
        free.synchronize()
    target.copy_(source)

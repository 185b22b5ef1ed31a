"""What a run takes of a card and of the host, moment by moment and at most in each of its phases.

Torch counts what its allocator hands out and what it holds in reserve; a card is also filled by the CUDA context, by
NCCL's buffers and by kernels. Only the driver sees all of it, and the driver keeps no peaks. So a thread looks every
few milliseconds, at the card and at what the kernel says this process has in host memory:

    allocated   tensors                                     torch, exact peaks
    reserved    tensors and the allocator's free blocks     torch, exact peaks
    used        all that is in use on the card              driver, peaks of samples
    anonymous   host memory that only swap can take back    /proc/self/status, RssAnon
    file        mapped files, which the kernel drops and reads again at will; libraries, too     RssFile
    shared      shared memory                               RssShmem
    pinned      of these, what torch has page-locked for the device

A page that two ranks map, such as a library's, counts for both. On a card that other programs use, "used" counts
theirs as well.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("seconds", "allocated", "reserved", "used", "anonymous", "file", "shared", "pinned")
"""Of a sample: seconds since the epoch, then bytes."""

_STATUS_LINES = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
_HEARTBEAT_SECONDS = 0.5

Sample = tuple[float, int, int, int, int, int, int, int]


class MemoryTrace:
    """Samples of one process, divided into phases.

    Args:
        device (`torch.device`): This rank's card, or the CPU.
        interval_seconds (`float`): Time between samples.
        heartbeat (`Path`, *optional*): File that always says what phase it is and how much host memory is taken, for
            whoever has to explain why the process is gone.
    """

    def __init__(self, device: torch.device, interval_seconds: float = 0.025, heartbeat: Path | None = None) -> None:
        self.device, self.interval_seconds, self.heartbeat = device, interval_seconds, heartbeat
        self.samples: list[Sample] = []
        self.phases: list[dict[str, Any]] = []
        self._last_beat = 0.0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory trace", daemon=True)

    def begin(self, phase: str) -> None:
        """End the phase before this one, if there is one, and begin another."""
        self._end_phase()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.phases.append({"name": phase, "first": len(self.samples)})
        self._last_beat = 0.0
        self._sample()
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """End the last phase and look no more."""
        self._end_phase()
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def phase(self) -> str:
        """The name of the phase."""
        return self.phases[-1]["name"] if self.phases else "start"

    def thinned(self, num_samples: int = 500) -> list[Sample]:
        """Return at most so many samples, each the maximum of a stretch of them, so that no peak is lost."""
        stretch = -(-len(self.samples) // num_samples) or 1
        groups = [self.samples[first : first + stretch] for first in range(0, len(self.samples), stretch)]
        return [tuple(map(max, zip(*group, strict=True))) for group in groups]

    def _end_phase(self) -> None:
        if not self.phases or "seconds" in self.phases[-1]:
            return
        phase = self.phases[-1]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._sample()
        samples = self.samples[phase.pop("first") :]
        peaks = dict(zip(COLUMNS, map(max, zip(*samples, strict=True)), strict=True))
        if self.device.type == "cuda":
            peaks["allocated"] = torch.cuda.max_memory_allocated(self.device)
            peaks["reserved"] = torch.cuda.max_memory_reserved(self.device)
        # The most of the sum, which is less than the sum of what each was at most.
        peaks["host"] = max(sum(sample[4:7]) for sample in samples)
        began, ended = samples[0][0], samples[-1][0]
        phase |= {"began": began, "seconds": ended - began, "peaks": {n: v for n, v in peaks.items() if n != "seconds"}}

    def _run(self) -> None:
        while not self._stopped.wait(self.interval_seconds):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            sample = (time.time(), *device_bytes(self.device), *host_bytes(), pinned_bytes(self.device))
            self.samples.append(sample)
            if self.heartbeat is not None and sample[0] - self._last_beat > _HEARTBEAT_SECONDS:
                self._last_beat = sample[0]
                self.heartbeat.write_text(f"{self.phase}\n{sum(sample[4:7])}\n")


def device_bytes(device: torch.device) -> tuple[int, int, int]:
    """Return what is allocated, reserved and used on a card; zeros for a CPU."""
    if device.type != "cuda":
        return 0, 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total - free


def host_bytes() -> tuple[int, int, int]:
    """Return this process's anonymous, file-backed and shared memory.

    Source:
        https://man7.org/linux/man-pages/man5/proc_pid_status.5.html; the kernel's counts may lag by some pages.
    """
    found = dict.fromkeys(_STATUS_LINES.values(), 0)
    with open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in _STATUS_LINES:
                found[_STATUS_LINES[name]] = int(value.split()[0]) * 1024
    return found["anonymous"], found["file"], found["shared"]


def pinned_bytes(device: torch.device) -> int:
    """Return what torch's allocator of page-locked memory holds, rounded up as it rounds; zero for a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)

"""Processes that work together: how they meet, who speaks, and how they fail.

Every run of this package is distributed, a plain `python script.py` too: it becomes a process group of one, so that
one path through the code is written, tested and trusted. Two rules hold everywhere:

* **One voice.** What is worth a line is said once, by rank 0 (`log_once`).
* **Nobody is left waiting.** A rank that fails between two collectives would leave the others in the next one until
  a timeout of minutes. Stages that read files or allocate memory therefore run inside `fail_together`: every rank
  tells the others whether it got through, and all of them raise the first message.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from . import slurm
from .errors import RankError

logger = logging.getLogger("hf_qlora_fsdp")

_GLOO_THREAD = "pt_gloo_runloop"
_SECONDS_BETWEEN_LOOKS, _MOST_SECONDS_FOR_THREADS, _SECONDS_UNSEEN = 0.012, 10.0, 0.3
_THREADS = Path("/proc/self/task")


def rank() -> int:
    """Return this process's rank, 0 before any process group exists."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else int(_place().get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, 1 before any process group exists."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else int(_place().get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return the number of processes on this node, as the launcher says (`LOCAL_WORLD_SIZE`)."""
    return int(_place().get("LOCAL_WORLD_SIZE", world_size()))


def share_of_cores() -> int:
    """Return how many cores this process may use, if the others on this node use as many."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def is_launched() -> bool:
    """Return whether a launcher started this process: torchrun, `accelerate launch`, or srun with several tasks."""
    return "LOCAL_RANK" in _place()


def _place() -> Mapping[str, str]:
    """Return the environment, with what srun says in the words of the other launchers."""
    return slurm.read_step(os.environ) or os.environ


def log_once(message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log one line on rank 0 alone.

    The level is `WARNING` unless told otherwise because transformers shows nothing below it by default, and a line
    that says "this option of yours means something else here" must be seen.
    """
    if rank() == 0:
        logger.log(level, message, *args)


def join_process_group(device_type: str, timeout_seconds: float | None = None) -> None:
    """Join the process group of the launcher (srun is one too), or found a group of one where there is no launcher.

    The group serves both kinds of device (`cuda:nccl,cpu:gloo`): clipping and saving reduce tensors that live on the
    CPU whenever anything is offloaded, and NCCL alone then fails with "No backend type associated with device type
    cpu" (https://github.com/pytorch/pytorch/issues/148532).

    Args:
        device_type (`str`): `"cuda"`, or `"cpu"` for gloo processes without an accelerator.
        timeout_seconds (`float`, *optional*): How long a collective waits for the other ranks (`ddp_timeout`). Defaults
            to the backend's. A group that already exists keeps its own.
    """
    import torch.distributed as dist

    _part_in_peace()
    if dist.is_initialized():
        return
    adopted = slurm.read_step(os.environ)
    os.environ.update(adopted)
    alone = "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone:
        # accelerate decides by these variables whether a run is distributed at all.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    if device_type == "cuda":
        _choose_card(srun=bool(adopted))
    backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        log_once("No launcher found: training in this one process. For all GPUs: torchrun --nproc_per_node N script.py")
    else:
        dist.init_process_group(backend, timeout=timeout)


@functools.cache
def _part_in_peace() -> None:
    """Have the interpreter wait for gloo's threads before it ends.

    They let go of the tensors of the last collective when they get to it, for which they take the interpreter's lock.
    One that asks for it while the interpreter ends is ended itself, in the middle of C++ (`ProcessGroupGloo::runLoop`),
    and with it the process: SIGABRT, "terminate called without an active exception", in one of 5 to 20 runs on a busy
    CPU, after all was done (https://github.com/pytorch/pytorch/pull/179291). Leaving the group does not end these
    threads as long as a mesh holds it, and joining them would wait for ranks that are gone.
    """
    atexit.register(_wait_for_gloo)


def _wait_for_gloo() -> None:
    """Wait until gloo's threads have nothing to do, as the system sees it, which a starved one has not.

    Between two looks, in which the lock is free, one that has slept in both and did not wake has nothing to let go of:
    who waits for the lock wakes at least every 5 ms (`sys.getswitchinterval`), and who was woken no longer sleeps.
    """
    stop_at = time.monotonic() + _MOST_SECONDS_FOR_THREADS
    before: dict[str, str] = {}
    try:
        while (now := _look_at_gloo()) and time.monotonic() < stop_at:
            if now == before and all(state.startswith("S") for state in now.values()):
                return
            before = now
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except (OSError, KeyError):  # no Linux, or one that says less: there is nothing to go by but time
        time.sleep(_SECONDS_UNSEEN)


def _look_at_gloo() -> dict[str, str]:
    """Return for each of gloo's threads its state (`"S"`: it sleeps) and how often it has given up its core.

    Raises:
        OSError, KeyError: The system does not say.
    """
    seen = {}
    for thread in _THREADS.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = (thread / "status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if fields["Name"] == _GLOO_THREAD:
                counts = fields["voluntary_ctxt_switches"], fields["nonvoluntary_ctxt_switches"]
                seen[thread.name] = " ".join((fields["State"], *counts))
    return seen


def _choose_card(srun: bool) -> None:
    """Make this rank's card the current one: the one of its local rank, or the only one that it sees."""
    import torch

    num_cards = torch.cuda.device_count()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if num_cards > 1 else 0)
    if srun and local_world_size() < num_cards:
        log_once(
            "srun started %d task(s) on this node, which sees %d cards: the others are not used. For all of them: "
            "srun --ntasks-per-node %d",
            local_world_size(),
            num_cards,
            num_cards,
        )


def collective_device() -> str:
    """Return where small tensors are best reduced: on the CPU if the group can, so that no accelerator has to wait."""
    import torch.distributed as dist

    return "cpu" if "cpu:" in str(dist.get_backend_config()) else "cuda"


@contextlib.contextmanager
def fail_together(stage: str) -> Iterator[None]:
    """Run a stage on every rank; if it fails on one, raise on all.

    A collective: every rank must enter it, and nothing inside may wait for another rank.

    Args:
        stage (`str`): What is being done, for the message, e.g. `"reading model.layers.3"`.

    Raises:
        RankError: Another rank failed. The rank that failed raises its own exception.
    """
    import torch.distributed as dist

    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        said = _exchange_failures(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None and said:
            first = min(said)
            raise RankError(f"Rank {first} failed while {stage}, so every rank stops. It said: {said[first]}")
    if failure is not None:
        raise failure


def _exchange_failures(message: str | None) -> dict[int, str]:
    """Return what each failed rank said. One small all-reduce when, as nearly always, nobody failed."""
    import torch
    import torch.distributed as dist

    num_failed = torch.tensor([message is not None], dtype=torch.int32, device=collective_device())
    dist.all_reduce(num_failed)
    if not num_failed.item():
        return {}
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return {index: text for index, text in enumerate(messages) if text is not None}

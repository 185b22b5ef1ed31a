"""Run a function on several ranks at once and bring the results home.

A test of sharded code needs several processes, and three things make such tests a misery: two runs pick the same port,
a rank that fails leaves the others waiting for ever, and an assert that fails in a child says nothing in the report.
So here the ranks meet through a file in a temporary directory, the parent watches all of them against one deadline, and
what the function returns on each rank comes back to the parent, where the asserts belong:

    def gathered_sum(rank, start):
        total = torch.tensor(start + rank)
        dist.all_reduce(total)
        return total.item()

    def test_sum():
        assert run_ranks(gathered_sum, 2, 10) == [21, 21]

The function is sent by name (`module.qualname`), so it stands at the top level of a test module. It runs with the
default process group in place, one thread, a fixed seed, and the parent's warning filters: what is an error in a test
is an error on its ranks.

`run_ranks` starts fresh processes for one call. Importing TRL takes a process about nine seconds, so tests share a
`RankPool`, whose processes stay alive from one function to the next; the fixture `ranks` in conftest.py is such a pool.
Between two functions a pool puts back the environment and forgets accelerate's singletons. Classes that a function
patched stay patched: it has to undo that itself. Whatever goes wrong ends the processes, and the next call gets new
ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

# After the first rank has failed, how long the others may take to report. Ranks that fail for the same reason do so
# together; those that wait for the failed one never report.
GRACE_SECONDS = 1.0

# How long a rank may take to leave the process group and exit once it has nothing left to do.
GOODBYE_SECONDS = 10.0


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    backend: str = "gloo",
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
) -> list[Any]:
    """Call `fn(rank, *args)` on each of `world_size` new processes.

    Args:
        fn (`Callable`): A function at the top level of an importable module.
        world_size (`int`): The number of processes.
        *args (`Any`): Passed to `fn` on each rank; pickled.
        backend (`str`): Of the default process group. With `"gloo"` the ranks see no CUDA device, so that a test on the
            CPU is the same test everywhere; with `"cpu:gloo,cuda:nccl"` each rank has its own.
        env (`Mapping[str, str]`, *optional*): Added to the environment of each rank before torch is imported there.
        timeout (`float`): Seconds for everything, the start of the processes included.

    Returns:
        `list`: What `fn` returned, in the order of the ranks.

    Raises:
        RuntimeError: A rank raised or died. The message holds its traceback; the other ranks have been ended.
        TimeoutError: Some ranks were not done in time. The message names them and says where they were; all have been
            ended.
    """
    with RankPool(world_size, backend=backend, env=env, timeout=timeout) as pool:
        return pool.run(fn, *args)


class RankPool:
    """`world_size` processes that keep their default process group and run one function after the other.

    The processes start with the first `run`. A function that fails, or that leaves without the default process group,
    costs the pool its processes, and the next `run` starts new ones. The arguments are those of [`run_ranks`].
    """

    def __init__(
        self,
        world_size: int = 2,
        *,
        backend: str = "gloo",
        env: Mapping[str, str] | None = None,
        timeout: float = 180,
    ):
        self.world_size = world_size
        self.backend = backend
        self.env = dict(env or {})
        self.timeout = timeout
        self._workers: list[_Worker] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `fn(rank, *args)` on every rank; see [`run_ranks`] for what is returned and raised."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        job = pickle.dumps((fn, args, list(warnings.filters)))
        if not self._workers:
            self._start()
        try:
            for worker in self._workers:
                # A rank that has died since the last run cannot take the job; `_collect` sees the same and reports it.
                with contextlib.suppress(BrokenPipeError):
                    worker.pipe.send_bytes(job)
            reports = self._collect(deadline)
            self._raise_if_failed(reports)
        except BaseException:  # a KeyboardInterrupt too must not leave busy ranks behind
            self._kill()
            raise
        if not all(report.reusable for report in reports.values()):
            self.close()
        return [reports[rank].result for rank in range(self.world_size)]

    def close(self) -> None:
        """Let the ranks leave the process group together and exit. The pool can be used again after that."""
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                worker.pipe.send_bytes(GOODBYE)
        deadline = time.monotonic() + GOODBYE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.world_size):
            ours, theirs = spawn.Pipe()
            place = _Place(rank, self.world_size, self.backend, self._directory.name, self.env)
            process = spawn.Process(target=_serve, args=(place, theirs), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the rank does
            self._workers.append(_Worker(place, process, ours))

    def _collect(self, deadline: float) -> dict[int, _Report]:
        """Wait for reports until all are here, the deadline passes, or the grace after a first failure is over."""
        reports: dict[int, _Report] = {}
        waiting = {worker.pipe: worker for worker in self._workers}
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection), "only pipes are waited for"
                worker = waiting.pop(pipe)
                report = reports[worker.place.rank] = worker.receive()
                if report.error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return reports

    def _raise_if_failed(self, reports: Mapping[int, _Report]) -> None:
        errors = [f"rank {rank} failed:\n{reports[rank].error}" for rank in sorted(reports) if reports[rank].error]
        if errors:
            raise RuntimeError("\n".join(errors))
        stuck = [worker for worker in self._workers if worker.place.rank not in reports]
        if stuck:
            ranks = ", ".join(str(worker.place.rank) for worker in stuck)
            wheres = "\n".join(f"rank {worker.place.rank} was here:\n{worker.stack()}" for worker in stuck)
            raise TimeoutError(f"out of time, still busy: rank {ranks} of {self.world_size}\n{wheres}")

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers = []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None


# ---- What passes between the parent and a rank -----------------------------------------------------------------------

GOODBYE = b""


@dataclass(frozen=True)
class _Place:
    """Which of the ranks a process is, and where it meets the others."""

    rank: int
    world_size: int
    backend: str
    directory: str
    env: Mapping[str, str]

    @property
    def stack_file(self) -> Path:
        return Path(self.directory, f"stack-{self.rank}.txt")


@dataclass(frozen=True)
class _Report:
    """How a call went on one rank: its result, or the traceback of what stopped it."""

    result: Any = None
    error: str | None = None
    reusable: bool = True


@dataclass(frozen=True)
class _Worker:
    """The parent's end of one rank."""

    place: _Place
    process: BaseProcess
    pipe: connection.Connection

    def receive(self) -> _Report:
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return _Report(error=f"the process ended with exit code {self.process.exitcode} before it could report")

    def stack(self) -> str:
        """Return the Python stack of a rank that does not answer, which its `faulthandler` writes on SIGUSR1."""
        if not self.place.stack_file.exists():
            return "(still starting)"
        assert self.process.pid is not None, "a started process has an id"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)  # the signal is handled by the other process, in its own time
        return self.place.stack_file.read_text() or "(no stack)"


# ---- The rank's side -------------------------------------------------------------------------------------------------


def _serve(place: _Place, pipe: connection.Connection) -> None:
    """The life of a rank: join the group, run what comes through the pipe, leave when the parent says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once, with one traceback
    with pipe, contextlib.suppress(EOFError, BrokenPipeError):  # either one: the parent is gone
        try:
            _join(place)
        except BaseException:
            pipe.send_bytes(pickle.dumps(_Report(error=traceback.format_exc())))
            return
        while (job := pipe.recv_bytes()) != GOODBYE:
            pipe.send_bytes(_run_job(place, job))
        _leave()


def _join(place: _Place) -> None:
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.rank),
        LOCAL_WORLD_SIZE=str(place.world_size),
        OMP_NUM_THREADS="1",
    )
    on_cuda = "nccl" in place.backend
    if not on_cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(place.env)

    faulthandler.register(signal.SIGUSR1, file=place.stack_file.open("w"))

    import torch  # only now, so that it sees this environment
    import torch.distributed as dist

    torch.set_num_threads(1)
    if on_cuda:
        torch.cuda.set_device(place.rank)
    dist.init_process_group(
        place.backend,
        init_method=Path(place.directory, "rendezvous").as_uri(),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(hours=1),  # the parent's deadline comes first and says more
        device_id=torch.device("cuda", place.rank) if on_cuda else None,
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _run_job(place: _Place, job: bytes) -> bytes:
    """Run one function and pack its report. Whatever goes wrong is the report, a result that does not pickle too."""
    import torch
    import torch.distributed as dist

    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            fn, args, filters = pickle.loads(job)
            _adopt_filters(filters)
            torch.manual_seed(0)
            result = fn(place.rank, *args)
        return pickle.dumps(_Report(result, reusable=dist.is_initialized()))
    except BaseException:  # SystemExit and pytest's outcomes are failures of a rank as well
        return pickle.dumps(_Report(error=traceback.format_exc()))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        _forget_accelerate()
        gc.collect()  # sharded models hold reference cycles, and the next function wants the memory


def _adopt_filters(filters: list[Any]) -> None:
    """Make the parent's warning filters this process's own."""
    warnings.resetwarnings()
    for action, message, category, module, lineno in reversed(filters):  # each call puts its filter in front
        # A filter holds compiled patterns, the call wants their texts.
        texts = [getattr(pattern, "pattern", pattern) or "" for pattern in (message, module)]
        warnings.filterwarnings(action, texts[0], category, texts[1], lineno)


def _forget_accelerate() -> None:
    """accelerate keeps the first Accelerator's settings in class attributes and refuses a second one that differs."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

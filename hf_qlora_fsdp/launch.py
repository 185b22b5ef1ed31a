"""Starting the processes of a run from one command, so that nobody has to type `torchrun`.

The workers are started and watched by torch's own elastic agent, inside this process: what `torchrun --standalone`
does, without a process in between that an interruption could leave behind. A worker that fails ends the others; Ctrl-C,
or a SIGTERM to this process, ends them all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType

from . import ranks

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What torch's agent ends its workers for, by default."""

SHUTDOWN_SECONDS = 10
"""How long workers may take to end once they are told to; torch's 30 s are long for one who pressed Ctrl-C."""


def default_num_processes() -> int:
    """Return the number of GPUs, or 2 where there is none."""
    import torch

    return torch.cuda.device_count() or 2


def is_worker() -> bool:
    """Return whether a launcher started this process."""
    return ranks.is_launched()


def run_workers(
    module: str,
    arguments: Sequence[str],
    num_processes: int,
    environment: dict[str, str] | None = None,
    handed_on: Sequence[signal.Signals] = (),
) -> dict[int, int]:
    """Run `python -m module arguments...` in several processes on this machine, and wait for them.

    Args:
        module (`str`): What each of them runs.
        arguments (`Sequence[str]`): Its arguments.
        num_processes (`int`): How many; the CPU cores are divided among them.
        environment (`dict[str, str]`, *optional*): Variables for them, where the user has not set them.
        handed_on (`Sequence[signal.Signals]`): Signals to this process that are theirs to answer, in their own time:
            they get them, and nothing else happens. Before they are started, such a signal ends the run.
    Returns:
        `dict[int, int]`: Exit codes of the workers that failed, by rank; minus the number of the signal that killed
            one. Empty if all went well.
    Raises:
        KeyboardInterrupt: This process was interrupted or told to end. No worker is left.
    """
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    defaults = {"OMP_NUM_THREADS": str(num_threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    with _environment(defaults | (environment or {})), _signal_handlers_kept(handed_on):
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in _ENDING if number not in handed_on),
        )
        for number in handed_on:
            signal.signal(number, _hand_on)
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            # The agent ended the others itself, and counts them.
            return {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
        except SignalException as error:
            raise KeyboardInterrupt from error
    return {}


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, for as long as this lasts."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the workers."""
    import psutil

    workers = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            if "LOCAL_RANK" in child.environ():
                workers.append(child)
                child.send_signal(number)
    if not workers:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _signal_handlers_kept(others: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """Put back the handlers that torch's agent replaces with its own, and others."""
    before = {number: signal.getsignal(number) for number in (*_ENDING, *others)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not in the main thread, where the agent replaced none
                signal.signal(number, handler)

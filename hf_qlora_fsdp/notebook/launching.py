"""Training on all GPUs from a cell of a notebook.

    kernel                           agent                        workers, one a GPU
    notebook_launch(train, ...)      python -m ...notebook.worker     python -m ...notebook.worker
      function and arguments   -->     starts and watches them  -->     call the function
      prints in the cell       <--------------------------------------  what they print
      returns, or raises       <--------------------------------------  rank 0's result, or a traceback

Launchers that fork the kernel work only as long as it has not touched CUDA, nor imported what touches it; and that is
what importing TRL does. Here nothing is inherited: the workers are new processes, the same that `hf-qlora-fsdp demo`
starts, and it does not matter what the notebook has imported or which GPU it has used.

**How a function gets there.** One that was defined in a cell cannot be imported, so it is sent by value, with the
functions, classes and constants that it refers to, by `dill`: it comes with `datasets`, and takes along what the
function uses, which its source alone would lack. What is big should not be referred to but loaded by the function:
models and data sets by name.

**How it ends.** An exception on a worker ends all of them, and is shown in the cell with its traceback. Interrupting
the cell ends them too: a trainer finishes its step and saves a checkpoint first, if it can within ten seconds. So does
the end of the kernel, however it comes: the agent reads from a pipe that closes then.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import linecache
import os
import queue
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import WorkerError
from ..launch import SHUTDOWN_SECONDS, default_num_processes
from ..units import format_bytes
from .worker import EXIT_CODES, FAILURES, PAYLOAD, PIDS, RESULT

_LARGE_BYTES = 256 * 2**20
"""What is larger than this is worth a word: every worker reads it."""

_WORKER = "HF_QLORA_FSDP_NOTEBOOK_WORKER"
"""Set for the workers, which shall start no workers of their own."""

_OF_THE_KERNEL = ("MPLBACKEND", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that are not handed on: where the kernel draws its figures, and the process group of one that a sharded
model in the notebook has made of it."""


def notebook_launch(
    function_or_script: Callable[..., Any] | str | os.PathLike[str],
    num_processes: int | str = "auto",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run a function, or a script, in several processes on this machine, and show in the cell what they print.

    Args:
        function_or_script (`Callable` or `str`): A function, which may be defined in a cell; each worker calls it. Or
            the path of a script, which each worker runs as `python script.py args...` would.
        num_processes (`int` or `"auto"`): How many; one a GPU by default, or 2 where there is none.
        args (`Sequence`): Positional arguments, or those of the script's command line.
        kwargs (`Mapping`, *optional*): Named arguments of the function.
        environment (`Mapping[str, str]`, *optional*): Variables for the workers, before those of the notebook.
    Returns:
        What the function returned on rank 0; of a script, its variable `result`, if there is one. A copy: return
        metrics and paths, not a sharded model.
    Raises:
        ValueError: Such a thing cannot be launched, or what it refers to cannot be sent.
        WorkerError: A worker failed. Its cause is the traceback of that worker.
        KeyboardInterrupt: The cell was interrupted. No worker is left.
    """
    if _WORKER in os.environ:
        raise ValueError(
            "notebook_launch was called by a worker: each of them would start workers of its own. Call it in a cell, "
            "and what the workers shall do in the function."
        )
    count = _count_processes(num_processes)
    with tempfile.TemporaryDirectory(prefix="notebook-") as name:
        folder = Path(name)
        payload = _pack(function_or_script, list(args), dict(kwargs or {}))
        (folder / PAYLOAD).write_bytes(payload)
        _warn(len(payload), count, environment or {})
        variables = {key: value for key, value in os.environ.items() if key not in _OF_THE_KERNEL}
        variables |= {**(environment or {}), _WORKER: "1"}
        _run_agent(folder, count, variables)
        return _collect(folder, count)


def _count_processes(num_processes: int | str) -> int:
    if num_processes == "auto":
        return default_num_processes()
    if isinstance(num_processes, bool) or not isinstance(num_processes, int) or num_processes < 1:
        raise ValueError(
            f"num_processes={num_processes!r}: nothing would run. Write a number of processes, 1 or more, or 'auto' "
            "for one a GPU."
        )
    return num_processes


def _pack(function_or_script: Any, args: list[Any], kwargs: dict[str, Any]) -> bytes:
    """Return the bytes that tell a worker what to do. The search path goes first: the rest may need it."""
    import dill

    sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    if callable(function_or_script):
        task: dict[str, Any] = {"function": function_or_script, "args": args, "kwargs": kwargs}
    else:
        script = Path(function_or_script)
        if not script.is_file():
            raise ValueError(
                f"function_or_script={str(script)!r} is neither a function nor a script that exists here "
                f"({Path.cwd()}). Pass a function, without calling it, or the path of a Python file."
            )
        if kwargs:
            raise ValueError(
                f"kwargs={kwargs!r} with a script, whose command line has no named arguments. Write them as the "
                "script takes them, in args: ['--rate', '1e-4']."
            )
        task = {"script": str(script.absolute()), "args": [str(arg) for arg in args]}
    try:
        packed = dill.dumps(task, recurse=True)
    except Exception as problem:
        raise ValueError(
            f"{function_or_script!r} or its arguments cannot be sent to the workers ({type(problem).__name__}: "
            f"{problem}): something that it refers to exists in this process alone, an open file, a trainer or a lock. "
            "Create it inside the function, and pass what it is made from: a name, a path, a number."
        ) from problem
    return dill.dumps({"path": sys.path, "sources": sources, "task": packed})


def _warn(payload_bytes: int, num_processes: int, environment: Mapping[str, str]) -> None:
    """Say what takes memory that the workers could use, and that GPUs are too few for them."""
    import torch

    num_gpus = torch.cuda.device_count()
    lines = []
    if payload_bytes > _LARGE_BYTES:
        lines.append(
            f"The function takes {format_bytes(payload_bytes)} along, which each worker reads and keeps. What is large "
            "is better loaded inside the function, by its name."
        )
    if 0 < num_gpus < num_processes and "CUDA_VISIBLE_DEVICES" not in environment:
        lines.append(
            f"{num_processes} workers share {num_gpus} GPU(s), which a sharded model cannot. Leave num_processes out, "
            'or write environment={"CUDA_VISIBLE_DEVICES": ""} for the CPU.'
        )
    for index in range(num_gpus if torch.cuda.is_initialized() else 0):
        taken = torch.cuda.memory_reserved(index)
        if taken > _LARGE_BYTES:
            lines.append(
                f"This notebook holds {format_bytes(taken)} of GPU {index}, which the workers cannot use. To free it, "
                "`del` what lies there and call torch.cuda.empty_cache()."
            )
    for line in lines:
        print(line, file=sys.stderr)


# -- The agent ---------------------------------------------------------------------------------------------------------


def _run_agent(folder: Path, num_processes: int, environment: dict[str, str]) -> None:
    """Run the workers to their end, and print what they print."""
    command = [sys.executable, "-u", "-m", "hf_qlora_fsdp.notebook.worker", str(folder), str(num_processes)]
    home = str(Path(__file__).parents[2])
    # Elsewhere it is a checkout, found by the notebook's sys.path.
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
    agent = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,  # nothing is written; it closes when this process ends
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the kernel's interruption is ours to pass on
    )
    assert agent.stdin is not None and agent.stdout is not None
    chunks = _listen(agent.stdout)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        for chunk in _read_live(agent, chunks):
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()
    except BaseException:
        agent.terminate()
        raise
    finally:
        _wait(agent, folder)
        agent.stdin.close()
        # After an interruption: where a trainer has saved what it had, for instance.
        sys.stdout.write(decoder.decode(b"".join(_take_all(chunks))))
        sys.stdout.flush()


def _listen(pipe: IO[bytes]) -> queue.Queue[bytes]:
    """Return a queue of what is printed, as it is, carriage returns of progress bars too; an empty one is the end."""
    chunks: queue.Queue[bytes] = queue.Queue()

    def read() -> None:  # in a thread, so that nobody who prints has to wait for a cell that is being interrupted
        with pipe:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                chunks.put(chunk)
        chunks.put(b"")

    threading.Thread(target=read, daemon=True).start()
    return chunks


def _read_live(agent: subprocess.Popen[bytes], chunks: queue.Queue[bytes]) -> Iterator[bytes]:
    """Yield what is printed until the agent has ended."""
    while True:
        try:
            chunk = chunks.get(timeout=1)
        except queue.Empty:
            if agent.poll() is not None:  # and something it started holds on to the pipe
                return
            continue
        if not chunk:
            return
        yield chunk


def _take_all(chunks: queue.Queue[bytes]) -> Iterator[bytes]:
    """Yield what is in a queue already."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield chunks.get(timeout=0.1)


def _wait(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until agent and workers have ended. Ends them by force after a while, or at another interruption."""
    try:
        agent.wait(SHUTDOWN_SECONDS + 5)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        agent.kill()
        for file in folder.glob(PIDS.format("*")):
            _kill(int(file.read_text()))
        agent.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# -- What comes back ---------------------------------------------------------------------------------------------------


class _RemoteTraceback(Exception):
    """The traceback of a worker, as text: what a process raised cannot always be sent to another."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"on the worker\n\n{self.text}"


def _collect(folder: Path, num_processes: int) -> Any:
    """Return rank 0's result, or raise what went wrong first."""
    import dill

    said = [json.loads(file.read_text()) for file in folder.glob(FAILURES.format("*"))]
    if said:
        # A rank that stops because another one failed has nothing to say about the reason.
        first = min(said, key=lambda failure: (failure["follows"], failure["time"]))
        raise WorkerError(
            f"Rank {first['rank']} of {num_processes} failed, and all were ended: {first['what']}"
        ) from _RemoteTraceback(first["traceback"])
    codes = json.loads((folder / EXIT_CODES).read_text()) if (folder / EXIT_CODES).exists() else {"?": 1}
    for rank, code in codes.items():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        why = " The kernel does that when the memory of the host runs out." if code == -signal.SIGKILL else ""
        raise WorkerError(f"Rank {rank} of {num_processes} {how}, and all were ended.{why} What it said is above.")
    return dill.loads((folder / RESULT).read_bytes())

"""The other side of `launching.py`: the agent that starts the workers, and what each worker does.

    python -m hf_qlora_fsdp.notebook.worker FOLDER NUM_PROCESSES    the agent
    python -m hf_qlora_fsdp.notebook.worker FOLDER                  a worker, under a launcher

They find their task in a folder and leave there what they have to say: results, failures, exit codes.
"""

from __future__ import annotations

import json
import linecache
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ..errors import RankError
from ..launch import run_workers

PAYLOAD, RESULT, EXIT_CODES = "payload.pkl", "result.pkl", "exit_codes.json"
PIDS, FAILURES = "pid-{}", "failure-{}.json"


def run_agent(folder: Path, num_processes: int) -> int:
    """Start the workers and watch them, until they or the notebook end.

    Returns:
        `int`: Exit code: 0, 1 if a worker failed, 130 if this process was told to end.
    """
    threading.Thread(target=_end_with_notebook, daemon=True).start()
    try:
        failed = run_workers(__spec__.name, [str(folder)], num_processes)
    except KeyboardInterrupt:
        return 130
    (folder / EXIT_CODES).write_text(json.dumps(failed))
    return 1 if failed else 0


def _end_with_notebook() -> None:
    """Wait for the end of the notebook, which holds the other end of this pipe, and end the workers then."""
    while os.read(0, 1):  # not `sys.stdin`, whose lock would be held when this process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def run_worker(folder: Path) -> int:
    """Do the task. Returns the exit code."""
    import dill

    rank = int(os.environ["RANK"])
    (folder / PIDS.format(rank)).write_text(str(os.getpid()))
    try:
        payload = dill.loads((folder / PAYLOAD).read_bytes())
        sys.path[:] = payload["path"]
        linecache.cache.update(payload["sources"])  # so that tracebacks show the lines of cells
        result = _perform(dill.loads(payload["task"]))
        if rank == 0:
            (folder / RESULT).write_bytes(_pack_result(result))
        _leave_group()
    except BaseException as problem:
        _write_failure(folder, rank, problem)
        return 1
    return 0


def _perform(task: dict[str, Any]) -> Any:
    try:
        if "function" in task:
            return task["function"](*task["args"], **task["kwargs"])
        sys.argv = [task["script"], *task["args"]]
        sys.path.insert(0, str(Path(task["script"]).parent))
        return runpy.run_path(task["script"], run_name="__main__").get("result")
    except SystemExit as end:  # `sys.exit(main())` at the end of a script
        if end.code not in (None, 0):
            raise
        return None


def _pack_result(result: Any) -> bytes:
    import dill

    try:
        return dill.dumps(result, recurse=True)
    except Exception as problem:
        raise ValueError(
            f"The function returned a {type(result).__name__}, which cannot be sent to the notebook "
            f"({type(problem).__name__}: {problem}): part of it exists in this process alone. Return metrics, and the "
            "path of what was saved."
        ) from problem


def _leave_group() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _write_failure(folder: Path, rank: int, problem: BaseException) -> None:
    frames = problem.__traceback__
    # What is in this file is no news to anybody.
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(problem), problem, frames))
    said = "".join(traceback.format_exception_only(type(problem), problem)).strip()
    found = {"rank": rank, "what": said, "traceback": text, "time": time.time()}
    found["follows"] = isinstance(problem, RankError)
    file = folder / FAILURES.format(rank)
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sys.exit(run_agent(target, int(sys.argv[2])) if len(sys.argv) > 2 else run_worker(target))

"""Ranks that fail fail together, say why once, and wait no longer than they were told to."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from hf_qlora_fsdp import ranks as ranks_module
from hf_qlora_fsdp.errors import RankError
from hf_qlora_fsdp.ranks import fail_together, join_process_group, local_world_size, log_once, rank, world_size
from tests.distributed import run_ranks


def fail_on(rank: int, failing: list[int]) -> tuple[str, str] | None:
    try:
        with fail_together("counting sheep"):
            if rank in failing:
                raise OSError(f"sheep {rank} is black")
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_one_fails_all_stop_and_the_group_goes_on(ranks):
    said = "Rank 1 failed while counting sheep, so every rank stops. It said: OSError: sheep 1 is black"
    assert ranks.run(fail_on, [1]) == [("RankError", said), ("OSError", "sheep 1 is black")]
    assert ranks.run(fail_on, []) == [None, None]
    assert ranks.run(fail_on, [0, 1]) == [("OSError", "sheep 0 is black"), ("OSError", "sheep 1 is black")]
    assert ranks.run(fail_on, [0])[1] == ("RankError", said.replace("1", "0"))


def test_alone_an_exception_is_itself():
    assert not dist.is_initialized()
    assert fail_on(0, [0]) == ("OSError", "sheep 0 is black")
    assert fail_on(0, []) is None
    assert issubclass(RankError, RuntimeError)


def speak(rank: int) -> list[tuple[str, str]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("hf_qlora_fsdp")
    logger.addHandler(handler)
    log_once("%d sheep", 3)
    log_once("black", level=logging.INFO if logger.isEnabledFor(logging.INFO) else logging.ERROR)
    logger.removeHandler(handler)
    return [(record.levelname, record.getMessage()) for record in records]


def test_rank_0_speaks_for_all(ranks):
    first, second = ranks.run(speak)
    assert first[0] == ("WARNING", "3 sheep") and len(first) == 2
    assert second == []


def where_am_i(_: int) -> tuple[int, int, int]:
    return rank(), world_size(), local_world_size()


def test_places(ranks, monkeypatch):
    assert ranks.run(where_am_i) == [(0, 2, 2), (1, 2, 2)]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert where_am_i(0) == (0, 1, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert where_am_i(0) == (5, 8, 4)


def wait_in_vain(rank: int) -> tuple[str, float]:
    """Leave the group of the pool for one whose collectives wait a second, as a launcher's processes would join it."""
    dist.destroy_process_group()
    join_process_group("cpu", timeout_seconds=1.5)
    join_process_group("cpu", timeout_seconds=60)  # a group that exists is left alone
    started = time.monotonic()
    try:
        if rank == 0:
            dist.barrier()
        else:
            time.sleep(4)
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - started
    finally:
        dist.destroy_process_group()
    return "none", 0.0


def test_timeout_is_honoured(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (error, seconds), _ = run_ranks(wait_in_vain, 2, env=env, timeout=60)
    assert error != "none" and 1 < seconds < 3.5


def unlaunched() -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in launched}


def test_a_process_without_a_launcher_is_a_group_of_one():
    script = (
        "import os, torch, torch.distributed as dist\n"
        "from hf_qlora_fsdp.ranks import join_process_group\n"
        "join_process_group('cpu', 7)\n"
        "x = torch.ones(1); dist.all_reduce(x)\n"
        "timeout = dist.distributed_c10d._get_default_group()._get_backend(torch.device('cpu')).options._timeout\n"
        "print(dist.get_world_size(), x.item(), os.environ['LOCAL_RANK'], timeout.seconds)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=unlaunched(), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "1.0", "0", "7"], done.stderr
    assert "torchrun --nproc_per_node N" in done.stderr


ENDING_BUSY = """
import atexit, ctypes, sys
import torch, torch.distributed as dist
from hf_qlora_fsdp.ranks import join_process_group
join_process_group("cpu")

@atexit.register  # runs before what was registered when the group was joined
def end_busy():
    sys.setswitchinterval(100)
    for _ in range(100):
        dist.all_reduce(torch.ones(4), async_op=True)
    ctypes.PyDLL(None).usleep(200_000)  # with the interpreter's lock, for which gloo's threads come to wait
"""


def test_gloos_threads_let_go_of_their_tensors_before_the_interpreter_ends():
    """Not waited for, most such processes end with SIGABRT. Three, so that luck would have to come thrice."""
    command = [sys.executable, "-c", ENDING_BUSY]
    processes = [subprocess.Popen(command, env=unlaunched(), stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said


@pytest.mark.parametrize("system", ["has no such folder", "counts no switches"])
def test_where_threads_cannot_be_seen_they_are_given_time(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every system is a Linux, nor tells as much as one."""
    if system == "counts no switches":
        (tmp_path / "task" / "7").mkdir(parents=True)
        (tmp_path / "task" / "7" / "status").write_text("Name:\tpt_gloo_runloop\nState:\tS (sleeping)\n")
    monkeypatch.setattr(ranks_module, "_THREADS", tmp_path / "task")
    started = time.monotonic()
    ranks_module._wait_for_gloo()
    assert 0.3 <= time.monotonic() - started < 10

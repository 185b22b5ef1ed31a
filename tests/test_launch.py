"""Workers that are started from one command: they end well, or all of them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_qlora_fsdp.launch import _hand_on, run_workers

WORKER = """
import os, signal, sys, time
from pathlib import Path
folder, what = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "FROM_PARENT")
(folder / f"rank-{rank}").write_text(" ".join([str(os.getpid()), *(os.environ[name] for name in names)]))
if what == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "answer":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(70 + rank))
    (folder / f"ready-{rank}").touch()
if what != "end":
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("OMP_NUM_THREADS")
    return tmp_path


def started(folder: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().split() for file in sorted(folder.glob("rank-*"))}


def is_alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_workers_find_each_other_and_their_share_of_the_cores(folder: Path) -> None:
    environment, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_workers("some_worker", [str(folder), "end"], 2, {"FROM_PARENT": "yes"}) == {}
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert {name: said[1:] for name, said in started(folder).items()} == {
        "rank-0": ["2", "0", "2", threads, "yes"],
        "rank-1": ["2", "1", "2", threads, "yes"],
    }
    assert {name: value for name, value in os.environ.items() if name in environment} == environment
    assert "FROM_PARENT" not in os.environ and "OMP_NUM_THREADS" not in os.environ
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_worker_that_is_killed_ends_the_others(folder: Path) -> None:
    began = time.monotonic()
    failed = run_workers("some_worker", [str(folder), "kill"], 2, {"FROM_PARENT": "x"})
    assert failed == {1: -signal.SIGKILL}
    assert time.monotonic() - began < 60
    assert len(started(folder)) == 2
    assert not any(is_alive(said[0]) for said in started(folder).values())


def test_workers_answer_a_signal_that_is_handed_on(folder: Path) -> None:
    """Their exit codes come back. Without workers there is nobody to answer, and the signal ends the run."""
    script = (
        "import signal, sys; from hf_qlora_fsdp.launch import run_workers\n"
        f"failed = run_workers('some_worker', [{str(folder)!r}, 'answer'], 2, {{'FROM_PARENT': 'x'}},\n"
        "                     handed_on=[signal.SIGUSR1])\n"
        "print(sorted(failed.items()), signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL)\n"
    )
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGUSR1)
    said = parent.communicate(timeout=60)[0].strip()
    assert parent.returncode == 0
    assert said in ("[(0, 70), (1, 71)] True", "[(0, 70)] True", "[(1, 71)] True")  # the first ends the other
    with pytest.raises(KeyboardInterrupt):
        _hand_on(signal.SIGUSR1, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all(folder: Path, number: int) -> None:
    script = (
        "import sys; from hf_qlora_fsdp.launch import run_workers\n"
        f"try: run_workers('some_worker', [{str(folder)!r}, 'wait'], 2, {{'FROM_PARENT': 'x'}})\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(started(folder)) < 2 or not all(said for said in started(folder).values()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(timeout=60) == 130
    assert not any(is_alive(said[0]) for said in started(folder).values())

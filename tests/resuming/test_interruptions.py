"""Signals and kills, as schedulers and machines deal them: under a real `torchrun`, and at random moments.

Importing TRL takes a process ten seconds, so the runs that are killed are forked by a process that has imported it all
(`FORKER`). Whatever happens, the adapter at the end is the one of a run that nobody interrupted, to the bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_qlora_fsdp.resuming.checkpoints import newest_valid
from hf_qlora_fsdp.resuming.watch import EXIT_PREEMPTED
from tests import training
from tests.distributed import RankPool
from tests.test_export import ADAPTER
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
TIMEOUT = 150
# After a rank is gone, how long the others may take to notice and stop. torchrun kills after 30 s, whatever they do.
STOP_SECONDS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def wait_for(condition: Any, what: str, seconds: float = TIMEOUT) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(what)


def train_whole(rank: int, folder: str, out: str, num_steps: int) -> dict[str, torch.Tensor]:
    changes = {"folder": out, "max_steps": num_steps, "logging_steps": 50}
    return training.run(training.ours(folder, training.equal_rows(12), changes, {"lora_dropout": 0.1})).adapter


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- Under torchrun --------------------------------------------------------------------------------------------------

NUM_STEPS = 8

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from transformers import TrainerCallback
from tests import training

folder, out, mode = sys.argv[1:]

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if mode == "wait":
            Path(out, f"rank-{dist.get_rank()}").write_text(f"{os.getpid()} {state.global_step}")
            time.sleep(0.4)  # so that the signal comes in the middle, and not after the end
    def on_step_begin(self, args, state, control, **kwargs):
        if mode == "die" and state.global_step == 4 and dist.get_rank() == 1 and not Path(out, "died").exists():
            Path(out, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

changes = {"folder": out, "max_steps": 8, "save_strategy": "steps", "save_steps": 3 if mode == "die" else 100}
trainer = training.ours(folder, training.equal_rows(12), changes, {"lora_dropout": 0.1}, callbacks=[Watch()])
trainer.train(resume_from_checkpoint=True)
trainer.save_model(f"{out}/final")
print("came to the end", flush=True)
"""


def launch(folder: str, out: Path, mode: str, *options: str) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    for stale in out.glob("rank-*"):
        stale.unlink()
    script = out / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # Of torch 2.13's: with the store shared, ranks that are started anew read the addresses of those that were killed.
    environment |= {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    with (out / "output").open("w") as output:
        return subprocess.Popen(
            [*launcher, str(script), folder, str(out), mode],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def end(run: subprocess.Popen[str], out: Path) -> str:
    """Wait for the end, or bring it about with all that belongs to it; return the output."""
    try:
        run.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        raise TimeoutError((out / "output").read_text()[-5000:]) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    return (out / "output").read_text()


def preempt(folder: str, out: Path, number: int, rank: int | None) -> tuple[str, float]:
    """Run, send a rank, or torchrun itself, a signal in the middle; return the output and the seconds till the end."""
    run = launch(folder, out, "wait", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    try:
        first = wait_for(lambda: [path.read_text() for path in out.glob(f"rank-{rank or 0}")], "no step was taken")
        os.kill(run.pid if rank is None else int(first[0].split()[0]), number)
        sent = time.monotonic()
    finally:
        output = end(run, out)
    return output, time.monotonic() - sent


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return ranks.run(train_whole, folder, str(tmp_path_factory.mktemp("whole")), NUM_STEPS)[0]


def test_signals_end_a_run_that_can_be_continued(
    folder: str, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    """SIGTERM to one worker, then, in the run that goes on, SIGUSR1 to torchrun, as Slurm sends it; then to the end."""
    out, steps = tmp_path / "out", [0]
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR1, None)):
        output, seconds = preempt(folder, out, number, rank)
        assert seconds < STOP_SECONDS
        assert f"{number.name} received: saving after step" in output and "came to the end" not in output, output
        if rank is not None:
            assert f"exitcode  : {EXIT_PREEMPTED} " in output, output
        newest, skipped = newest_valid(out)
        assert newest is not None and not skipped
        steps.append(int(newest.name.split("-")[1]))
    assert steps == sorted(set(steps)) and steps[-1] < NUM_STEPS
    run = launch(folder, out, "go on")
    output = end(run, out)
    assert run.returncode == 0, output
    assert f"Resuming from {newest}" in output and output.count("came to the end") == 2
    assert_same(out / "final" / ADAPTER, reference)


def test_torchrun_restarts_what_was_killed(folder: str, tmp_path: Path, reference: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "out"
    run = launch(folder, out, "die", "--max-restarts", "1")
    output = end(run, out)
    assert run.returncode == 0, output
    assert (out / "died").exists()
    # torchrun names the rank that died, and the second start says where it goes on.
    assert "failed (exitcode: -9) local_rank: 1" in output
    assert "holds no checkpoint: training starts from the beginning" in output
    assert f"Resuming from {out}/checkpoint-3" in output
    assert_same(out / "final" / ADAPTER, reference)


# ---- At random moments -----------------------------------------------------------------------------------------------

FORKER = """
import json, os, sys, traceback
import torch, transformers, trl, peft, bitsandbytes, datasets
import hf_qlora_fsdp.trainer, hf_qlora_fsdp.loader, transformers.models.llama.modeling_llama
from datetime import timedelta
from pathlib import Path
from tests import training

torch.set_num_threads(1)

class Report(transformers.TrainerCallback):
    def __init__(self, out):
        self.out = Path(out)
    def note(self, name, value):
        if torch.distributed.get_rank() == 0:
            (self.out / f"{name}.new").write_text(str(value))
            os.rename(self.out / f"{name}.new", self.out / name)
    def on_train_begin(self, args, state, control, **kwargs):
        self.note("started", state.global_step)
    def on_save(self, args, state, control, **kwargs):
        self.note("saved", state.global_step)

def train(rank, order):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{order['meet']}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    changes = {"folder": order["out"], "max_steps": order["steps"], "logging_steps": 50, "save_total_limit": 2,
               "save_strategy": "steps", "save_steps": 1}
    trainer = training.ours(
        order["model"], training.equal_rows(12), changes, {"lora_dropout": 0.1}, callbacks=[Report(order["out"])])
    trainer.train(resume_from_checkpoint=True)

for line in sys.stdin:
    order, children = json.loads(line), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            log = os.open(f"{order['out']}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            try:
                train(rank, order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    print(json.dumps(children), flush=True)
    ends = dict(os.waitpid(child, 0) for child in children)
    print(json.dumps([os.waitstatus_to_exitcode(ends[child]) for child in children]), flush=True)
"""


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", FORKER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        yield process
        process.kill()


def ask(forker: subprocess.Popen[str], **order: Any) -> list[int]:
    """Have a run started; return the ranks' process ids."""
    assert forker.stdin is not None and forker.stdout is not None
    forker.stdin.write(json.dumps(order) + "\n")
    forker.stdin.flush()
    return json.loads(forker.stdout.readline())


def kill_at_random(
    forker: subprocess.Popen[str], folder: str, out: Path, num_kills: int, seed: int
) -> tuple[int, list[str]]:
    """Start a run `num_kills` times and kill a rank of it; return the last step that was saved, and what went wrong."""
    moments, started, saved = random.Random(seed), out / "started", out / "saved"
    before = 0  # the step that the run was known to have saved when it was started
    for trial in range(num_kills):
        started.unlink(missing_ok=True)
        ranks = ask(forker, model=folder, out=str(out), meet=str(out / f"meet-{trial}"), steps=10_000)
        wait_for(started.exists, f"trial {trial} did not start: {(out / 'log-0').read_text()[-2000:]}", 60)
        resumed = int(started.read_text())
        assert resumed >= before, "steps were lost"
        time.sleep(moments.uniform(0.0, 1.2))
        victim = moments.randrange(2)
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
        codes = json.loads(forker.stdout.readline())  # type: ignore[union-attr]
        assert time.monotonic() - killed < STOP_SECONDS
        assert codes[victim] == -9 and codes[1 - victim] not in (0, -9), codes
        newest, skipped = newest_valid(out)
        assert skipped == [], "what has the name of a checkpoint is one"
        # It may have been killed before it reported anything, and the one before it between saving and reporting.
        before = max(resumed, int(saved.read_text()) if saved.exists() else 0)
        found = int(newest.name.split("-")[1]) if newest else 0
        assert before <= found <= before + 1, "saved, or saved and not yet reported"
        before = found
    return before, [path.name for path in out.glob("checkpoint-*")]


def finish(forker: subprocess.Popen[str], folder: str, out: Path, steps: int) -> None:
    ask(forker, model=folder, out=str(out), meet=str(out / "meet-last"), steps=steps)
    codes = json.loads(forker.stdout.readline())  # type: ignore[union-attr]
    assert codes == [0, 0], (out / "log-0").read_text()[-3000:]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == sorted(
        f"checkpoint-{step}" for step in (steps - 1, steps)
    )
    assert not list(out.glob(".saving-*"))


@pytest.mark.parametrize("num_kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_nothing(
    ranks: RankPool, forker: subprocess.Popen[str], folder: str, tmp_path: Path, num_kills: int
) -> None:
    """Kill rank 0 or 1, 0 to 1.2 s after training starts; most of a step's time is spent on saving."""
    out = tmp_path / "out"
    out.mkdir()
    saved, left = kill_at_random(forker, folder, out, num_kills, seed=num_kills)
    assert saved >= num_kills // 2 and len(left) <= 3
    finish(forker, folder, out, saved + 2)
    whole = ranks.run(train_whole, folder, str(tmp_path / "whole"), saved + 2)[0]
    assert_same(out / f"checkpoint-{saved + 2}" / ADAPTER, whole)

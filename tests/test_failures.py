"""A rank that fails stops all of them, with its message, and soon. Under a real `torchrun`.

`run_ranks` would end the others itself, so it cannot show that nobody is left waiting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint

ROOT = Path(__file__).parent.parent
TIMEOUT = 120
# Importing TRL on two busy cores takes most of it.
BOUND = 90

HEAD = """
import sys
import torch.distributed as dist
from transformers import TrainerCallback
from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer
from tests import training

folder, out = sys.argv[1:]
args = QLoRAFSDPConfig(**training.arguments(out, max_steps=6))
"""

IN_TRAINING = """
class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print(f"rank {dist.get_rank()} is at step 2", flush=True)
            if dist.get_rank() == 1:
                raise RuntimeError("the callback of rank 1 has had enough")

QLoRAFSDPTrainer(folder, args, train_dataset=training.equal_rows(12), callbacks=[Fail()]).train()
print("nobody must come here", flush=True)
"""

IN_LOADING = """
from hf_qlora_fsdp.loading import sources

quantize, calls = sources.quantize, []

def failing(*args, **kwargs):
    calls.append(1)
    if dist.get_rank() == 1 and len(calls) == 3:
        raise MemoryError("rank 1 has no memory left")
    return quantize(*args, **kwargs)

sources.quantize = failing
QLoRAFSDPTrainer(folder, args, train_dataset=training.equal_rows(12)).train()
print("nobody must come here", flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, float]]:
    """Run both scripts, one after the other: exit code, output and seconds of each."""
    folder = tmp_path_factory.mktemp("failures")
    model = make_checkpoint(folder / "model")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    results = {}
    for name, body in {"training": IN_TRAINING, "loading": IN_LOADING}.items():
        script = folder / f"{name}.py"
        script.write_text(HEAD + body)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        started = time.monotonic()
        done = subprocess.run(
            [*command, model, str(folder / "out")], env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        results[name] = done.returncode, done.stdout + done.stderr, time.monotonic() - started
    return results


@pytest.mark.parametrize("stage", ["training", "loading"])
def test_all_ranks_stop(outcomes: dict[str, tuple[int, str, float]], stage: str) -> None:
    code, output, seconds = outcomes[stage]
    assert code != 0
    assert seconds < BOUND
    assert "nobody must come here" not in output


def test_the_message_of_a_rank_that_fails_in_training_is_seen(outcomes: dict[str, tuple[int, str, float]]) -> None:
    output = outcomes["training"][1]
    assert "the callback of rank 1 has had enough" in output
    assert "rank 0 is at step 2" in output, "both were under way"


def test_a_rank_that_fails_while_loading_is_named_by_the_others(outcomes: dict[str, tuple[int, str, float]]) -> None:
    output = outcomes["loading"][1]
    assert "MemoryError: rank 1 has no memory left" in output
    assert "RankError: Rank 1 failed while reading" in output
    assert "It said: MemoryError: rank 1 has no memory left" in output

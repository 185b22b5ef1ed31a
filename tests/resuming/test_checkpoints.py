"""A checkpoint folder is whole or not there, whatever kills the process that writes it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_qlora_fsdp.resuming.checkpoints import (
    MANIFEST,
    STAGING_PREFIX,
    clear_leftovers,
    newest_valid,
    prune,
    publish,
    seal,
    verify,
)

FACTS = {"base_model": "some/model"}


def save(output_dir: Path, step: int, size: int = 1000) -> Path:
    """Save as a trainer does: aside, sealed, published."""
    final = output_dir / f"checkpoint-{step}"
    staging = output_dir / f"{STAGING_PREFIX}{final.name}"
    (staging / "other").mkdir(parents=True)
    (staging / "adapter.safetensors").write_bytes(random.Random(step).randbytes(size))
    (staging / "other" / "state.json").write_text(json.dumps({"step": step}))
    seal(staging, {**FACTS, "step": step})
    publish(staging, final)
    return final


def test_what_was_saved_is_verified(tmp_path):
    folder = save(tmp_path, 10)
    assert verify(folder)["step"] == 10
    assert newest_valid(tmp_path) == (folder, [])
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {"adapter.safetensors", "other/state.json"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: cut(folder / "adapter.safetensors"), "adapter.safetensors"),
        (lambda folder: flip(folder / "adapter.safetensors"), "adapter.safetensors"),
        (lambda folder: (folder / "other" / "state.json").unlink(), "state.json.*missing"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
        (lambda folder: cut(folder / MANIFEST), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path, damage, said):
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    damage(newer)
    with pytest.raises(ValueError, match=said):
        verify(newer)
    found, skipped = newest_valid(tmp_path)
    assert found == older
    assert len(skipped) == 1 and "checkpoint-10" in skipped[0]


def test_steps_are_compared_as_numbers_and_other_folders_are_left_alone(tmp_path):
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    (tmp_path / "checkpoint-11.backup").mkdir()
    (tmp_path / "final").mkdir()
    assert newest_valid(tmp_path) == (newest, [])
    assert newest_valid(tmp_path / "nowhere") == (None, [])


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 10, size=1000)
    folder = save(tmp_path, 10, size=2000)
    assert verify(folder) and (folder / "adapter.safetensors").stat().st_size == 2000
    assert clear_leftovers(tmp_path) == []


def test_killed_between_the_two_renames_the_old_one_comes_back(tmp_path):
    folder = save(tmp_path, 10)
    os.rename(folder, tmp_path / f"{STAGING_PREFIX}old-checkpoint-10")
    (tmp_path / f"{STAGING_PREFIX}checkpoint-10").mkdir()
    assert len(clear_leftovers(tmp_path)) == 2
    assert newest_valid(tmp_path) == (folder, [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    """A process that does nothing but save is killed 30 times; no finished checkpoint is ever lost or half there."""
    root = str(Path(__file__).parents[2])
    moments, reported = random.Random(0), tmp_path / "reported"
    # One process imports, and forks those that are killed: starting each anew would take a minute.
    command = [sys.executable, "-c", FORKER.format(root=root), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as forker:
        try:
            for _ in range(30):
                victim = int(forker.stdout.readline())
                time.sleep(moments.uniform(0.0, 0.3))
                os.kill(victim, signal.SIGKILL)
                assert forker.stdout.readline() == "dead\n"
                # Asked first, and only older ones are removed: the next process saves already.
                finished = int(reported.read_text()) if reported.exists() else 0
                found, skipped = newest_valid(tmp_path)
                assert skipped == []  # what has the name of a checkpoint is one
                newest = step_of(found) if found else 0
                assert finished <= newest
                for folder in tmp_path.glob("checkpoint-*"):
                    if step_of(folder) < newest:
                        shutil.rmtree(folder)
        finally:
            os.killpg(forker.pid, signal.SIGKILL)  # the one it has forked last, too
    assert finished > 10  # it did save in between


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


FORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from hf_qlora_fsdp.resuming.checkpoints import clear_leftovers
from tests.resuming.test_checkpoints import save
output = Path(sys.argv[1])
reported = output / "reported"
while True:
    child = os.fork()
    if child == 0:
        clear_leftovers(output)
        step = int(reported.read_text()) if reported.exists() else 0
        while True:
            step += 1
            save(output, step, size=3_000_000)
            (output / "new").write_text(str(step))
            os.rename(output / "new", reported)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.parametrize(
    ("written", "limit", "best", "left"),
    [
        ([1, 2, 3], None, None, {1, 2, 3}),
        ([1, 2, 3], 2, None, {2, 3}),
        ([1, 2, 3], 1, None, {3}),
        ([1, 2, 3], 2, 1, {1, 3}),
        ([1, 2, 3], 1, 1, {1, 3}),
        ([9, 10, 5, 6], 2, None, {5, 6}),  # gone back to 4: what has been written last is what counts
        ([9, 10, 6], 1, None, {6}),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, written, limit, best, left):
    for age, step in enumerate(written):
        newest = save(tmp_path, step)
        os.utime(newest, (age, age))
    prune(newest, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert {entry.name for entry in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_what_is_pruned_loses_its_name_first(tmp_path, monkeypatch):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path: [file.unlink() for file in path.glob("*.safetensors")])
    prune(newest, 1, None)  # as if killed in the middle
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert clear_leftovers(tmp_path) == [f"{STAGING_PREFIX}pruned-checkpoint-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

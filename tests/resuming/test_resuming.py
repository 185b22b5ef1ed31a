"""A resumed run is the uninterrupted one, whatever is trained and however; and nothing but that run is continued.

Runs are short and compared to the bit. Where the number of ranks changes, sums are taken in another order, and the
bounds are those that test_trainer.py derives. Interruptions by signals and kills are in resuming/test_interruptions.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hf_qlora_fsdp.resuming.checkpoints import MANIFEST, newest_valid, seal, verify
from tests import training
from tests.distributed import RankPool
from tests.test_export import ADAPTER, LOGIT_BOUND, logits_of
from tests.tiny import make_checkpoint, tiny_dataset

OPTIMIZER = "optimizer.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("out"))


def saving(out: str, **changes: Any) -> dict[str, Any]:
    """Return the changes for a run that saves every step."""
    return {"folder": out, "param_dtype": "float32", "save_strategy": "steps", "save_steps": 1} | changes


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def optimizer_states(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the optimizer's states whole, in the order of the parameters."""
    states = {}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in trainer.optimizer.optimizer.state[parameter].items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                states[f"{names[id(parameter)]} {key}"] = whole.clone()
    return states


# ---- The matrix ------------------------------------------------------------------------------------------------------

RECOMPUTING: dict[str, dict[str, Any]] = {
    "neither": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "fsdp activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
}
PLACES: dict[str, dict[str, Any]] = {"resident": {}, "offloaded": {"cpu_offload": True}}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}
CELLS = list(itertools.product(RECOMPUTING, PLACES, ADAPTERS))
NUM_TENSORS = {"lora": 28, "dora": 42, "head": 29}


def train_cells(rank: int, folder: str, out: str) -> dict[Any, dict[str, Any]]:
    """Train two steps a cell, saving both; then again from the first."""
    results = {}
    for index, (recomputing, place, adapter) in enumerate(CELLS):
        changes = saving(f"{out}/{index}", max_steps=2) | RECOMPUTING[recomputing] | PLACES[place]
        trainer = training.ours(folder, training.equal_rows(8), changes, ADAPTERS[adapter])
        whole = training.run(trainer)
        logits = logits_of(trainer.model)
        again = training.ours(folder, training.equal_rows(8), changes | {"save_strategy": "no"}, ADAPTERS[adapter])
        resumed = training.run(again, resume_from_checkpoint=f"{out}/{index}/checkpoint-1")
        results[recomputing, place, adapter] = {"whole": whole, "resumed": resumed, "logits": logits}
    return results


def load_cells(rank: int, folder: str, out: str) -> list[torch.Tensor]:
    """Load each last checkpoint as its user will: one process, no code of this package."""
    from peft import PeftModel

    return [
        logits_of(PeftModel.from_pretrained(training.plain_model(folder, torch.float32), f"{out}/{index}/checkpoint-2"))
        for index in range(len(CELLS))
    ]


@pytest.fixture(scope="module")
def cells(ranks: RankPool, folder: str, out: str) -> dict[Any, dict[str, Any]]:
    return ranks.run(train_cells, folder, f"{out}/cells", timeout=400)[0]


@pytest.fixture(scope="module")
def plain_logits(cells: dict[Any, Any], folder: str, out: str) -> list[torch.Tensor]:
    return training.alone().run(load_cells, folder, f"{out}/cells")[0]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_what_is_saved_is_what_is_in_memory(cells: dict[Any, dict[str, Any]], out: str, cell: Any) -> None:
    checkpoint = Path(out, "cells", str(CELLS.index(cell)), "checkpoint-2")
    in_memory = cells[cell]["whole"].adapter
    renamed = {
        name.replace("modules_to_save.", "").replace("magnitude_vector.weight", "magnitude_vector"): tensor
        for name, tensor in in_memory.items()
    }
    assert len(renamed) == NUM_TENSORS[cell[2]]
    assert_same(load_file(checkpoint / ADAPTER), renamed)
    verify(checkpoint)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_plain_peft_computes_the_trained_models_logits(
    cells: dict[Any, dict[str, Any]], plain_logits: list[torch.Tensor], cell: Any
) -> None:
    """DoRA divides by norms, which are sums as well, so its bound is twice that of test_export.py."""
    expected, plain = cells[cell]["logits"], plain_logits[CELLS.index(cell)]
    atol = LOGIT_BOUND * (2 if cell[2] == "dora" else 1) * expected.abs().max().item()
    assert torch.allclose(plain, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_cell_resumes_to_the_bit(cells: dict[Any, dict[str, Any]], cell: Any) -> None:
    whole, resumed = cells[cell]["whole"], cells[cell]["resumed"]
    assert len(whole.losses) == 2 and resumed.losses == whole.losses
    assert resumed.grad_norms == whole.grad_norms
    assert_same(whole.adapter, resumed.adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_cells_differ_in_memory_and_not_in_numbers(cells: dict[Any, dict[str, Any]], adapter: str) -> None:
    first = cells["neither", "resident", adapter]["whole"].adapter
    for recomputing, place in itertools.product(RECOMPUTING, PLACES):
        assert_same(first, cells[recomputing, place, adapter]["whole"].adapter)
    assert any((tensor != 0).all() for name, tensor in first.items() if "lora_B" in name)


def test_a_checkpoint_is_adapter_and_optimizer_and_little_else(cells: dict[Any, dict[str, Any]], out: str) -> None:
    for index, cell in enumerate(CELLS):
        checkpoint = Path(out, "cells", str(index), "checkpoint-2")
        files = {path.name: path for path in checkpoint.rglob("*") if path.is_file()}
        trained = sum(tensor.nbytes for tensor in cells[cell]["whole"].adapter.values())
        rest = sum(path.stat().st_size for path in files.values()) - 3 * trained  # itself, and Adam's two states
        # Names and places of tensors in the headers, the tokenizer, one random state a rank; whatever the model's size.
        assert 0 < rest < 100_000, (cell, rest)
        for name, path in files.items():
            start = path.read_bytes()[:2]
            assert start != b"PK" and start[:1] != b"\x80", f"{name} is a pickle"
            assert path.suffix in (".safetensors", ".json", ".jinja", ".md"), name
            if path.suffix == ".json":
                json.loads(path.read_text())
        stored = [name for path in files.values() if path.suffix == ".safetensors" for name in load_file(path)]
        ours = ("lora_", *(["lm_head"] if cell[2] == "head" else []))
        random_states = {f"{rank}.{kind}" for rank in range(2) for kind in ("torch", "numpy", "python")}
        assert [name for name in stored if not any(part in name for part in ours) and name not in random_states] == []


# ---- Exact in every respect ------------------------------------------------------------------------------------------

SCENARIOS: dict[str, dict[str, Any]] = {
    "packing, accumulation, dropout, schedule": {
        "rows": "text",
        "peft": {"lora_dropout": 0.1},
        "param_dtype": "bfloat16",
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": 64,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_steps": 5,
        "at": 4,
    },
    "second epoch": {"peft": {"lora_dropout": 0.1}, "max_steps": 7, "at": 5},
    "end of an epoch": {"peft": {"lora_dropout": 0.1}, "max_steps": 6, "at": 4},
    "after an evaluation": {"peft": {"lora_dropout": 0.1}, "eval_strategy": "steps", "eval_steps": 2, "at": 2},
    "streamed": {"rows": "streamed", "peft": {"lora_dropout": 0.1}, "at": 2},
    "rsLoRA, ranks of their own": {"peft": {"use_rslora": True, "rank_pattern": {"q_proj": 4}}, "at": 2},
    "two adapters": {"adapters": ["default", "second"], "at": 2},
    "an adapter with a name": {"adapters": ["mine"], "at": 2},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "at": 2},
}


def rows_of(kind: str) -> Any:
    if kind == "streamed":
        return training.equal_rows(16).to_iterable_dataset()
    return training.equal_rows(8) if kind == "equal" else tiny_dataset(32, kind)


def model_of(folder: str, adapters: list[str]) -> Any:
    """Return the folder, or a model with adapters of these names, all of them trained."""
    from peft import LoraConfig, get_peft_model

    if not adapters:
        return folder
    torch.manual_seed(11)
    config = LoraConfig(**training.LORA)
    model = get_peft_model(training.plain_model(folder, torch.float32), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**training.LORA | {"r": 4}))
    model.base_model.set_adapter(adapters)
    return model


def interrupt(rank: int, folder: str, out: str, names: list[str]) -> dict[str, dict[str, Any]]:
    results = {}
    for index, name in enumerate(names):
        changes = saving(f"{out}/{index}") | SCENARIOS[name]
        at, rows, adapters = changes.pop("at"), changes.pop("rows", "equal"), changes.pop("adapters", [])
        peft = {} if adapters else changes.pop("peft", {}) or None

        def start(adapters=adapters, rows=rows, peft=peft, **changes: Any) -> Any:
            evaluated = training.equal_rows(4) if "eval_strategy" in changes else None
            return training.ours(model_of(folder, adapters), rows_of(rows), changes, peft, eval_dataset=evaluated)

        trainer = start(**changes)
        whole = training.run(trainer)
        again = start(**changes | {"save_strategy": "no"})
        with training.listening() as said:
            resumed = training.run(again, resume_from_checkpoint=f"{out}/{index}/checkpoint-{at}")
        epochs = [entry["epoch"] for entry in whole.log if entry["step"] == at]
        results[name] = {
            "whole": whole,
            "resumed": resumed,
            "states": (optimizer_states(trainer), optimizer_states(again)),
            "rates": (trainer.lr_scheduler.state_dict(), again.lr_scheduler.state_dict()),
            "epoch": epochs[0],
            "said": said,
            "files": sorted(os.listdir(f"{out}/{index}/checkpoint-{at}")),
        }
    return results


@pytest.fixture(scope="module")
def interrupted(ranks: RankPool, folder: str, out: str) -> list[dict[str, dict[str, Any]]]:
    return ranks.run(interrupt, folder, f"{out}/interrupted", list(SCENARIOS), timeout=300)


@pytest.mark.parametrize("name", SCENARIOS)
def test_resumed_is_uninterrupted(interrupted: list[dict[str, dict[str, Any]]], name: str) -> None:
    for result in (results[name] for results in interrupted):
        whole, resumed = result["whole"], result["resumed"]
        assert len(whole.losses) == SCENARIOS[name].get("max_steps", 4)
        assert resumed.losses == whole.losses and resumed.grad_norms == whole.grad_norms
        assert [e["eval_loss"] for e in whole.log if "eval_loss" in e] == [
            e["eval_loss"] for e in resumed.log if "eval_loss" in e
        ]
        assert_same(whole.adapter, resumed.adapter)
        assert not [line for line in result["said"] if "other data" in line]
        assert_same(*result["states"])
        assert result["rates"][0] == result["rates"][1]


def test_the_scenarios_are_what_they_say(interrupted: list[dict[str, dict[str, Any]]]) -> None:
    results = interrupted[0]
    assert 0 < results["packing, accumulation, dropout, schedule"]["epoch"] % 1 < 1
    assert results["second epoch"]["epoch"] == 1.25 and results["end of an epoch"]["epoch"] == 1
    shapes = {
        tuple(t.shape) for n, t in results["rsLoRA, ranks of their own"]["whole"].adapter.items() if "q_proj" in n
    }
    assert shapes == {(4, 128), (128, 4)}
    two = results["two adapters"]["whole"].adapter
    assert len(two) == 56 and all(tensor.any() for name, tensor in two.items() if "lora_B" in name)
    assert "second" in results["two adapters"]["files"] and "mine" in results["an adapter with a name"]["files"]
    assert ADAPTER not in results["an adapter with a name"]["files"]


# ---- Which checkpoints are kept --------------------------------------------------------------------------------------


def keep_the_best(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Keep few checkpoints of a run whose best is the first; stop another early; save a step twice."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # it falls, so the best is the first
    }
    results: dict[str, Any] = {}

    def start(name: str, **more: Any) -> Any:
        callbacks = more.pop("callbacks", None)
        given = saving(f"{out}/{name}") | changes | more
        sets = {"eval_dataset": training.equal_rows(2), "callbacks": callbacks}
        return training.ours(folder, training.equal_rows(8), given, **sets)

    def left(name: str) -> list[str]:
        torch.distributed.barrier()
        return sorted(path.name for path in Path(out, name).iterdir() if path.is_dir())

    trainer = start("best", save_total_limit=2)
    results["best"] = training.run(trainer)
    results["best left"] = left("best")
    results["best is"] = trainer.state.best_model_checkpoint
    again = start("best", save_total_limit=2, max_steps=6)
    results["best, resumed"] = training.run(again, resume_from_checkpoint=True)
    results["best, resumed, left"] = left("best")

    stopped = start("stopped", save_total_limit=1, callbacks=[Stop()])
    with training.listening() as said:
        try:
            stopped.train()
        except SystemExit as end:
            results["code"] = end.code
    results["said"] = said
    results["stopped left"] = left("stopped")
    with training.listening() as said:
        results["stopped, resumed"] = training.run(start("stopped", save_total_limit=1), resume_from_checkpoint=True)
    results["said then"] = said

    first = training.run(training.ours(folder, training.equal_rows(8), saving(f"{out}/twice", max_steps=2)))
    once = training.ours(folder, training.equal_rows(8), saving(f"{out}/twice", max_steps=3))
    second = training.run(once, resume_from_checkpoint=f"{out}/twice/checkpoint-1")
    results["twice"] = (first.losses, second.losses)
    results["twice left"] = left("twice")
    return results


@pytest.fixture(scope="module")
def kept(ranks: RankPool, folder: str, out: str) -> list[dict[str, Any]]:
    return ranks.run(keep_the_best, folder, f"{out}/kept")


def test_the_best_and_the_newest_are_kept(kept: list[dict[str, Any]], out: str) -> None:
    for result in kept:
        assert result["best left"] == ["checkpoint-1", "checkpoint-4"]
        assert result["best is"] == f"{out}/kept/best/checkpoint-1"
        assert result["best, resumed, left"] == ["checkpoint-1", "checkpoint-6"]
        for run in (result["best"], result["best, resumed"]):
            assert_same(load_file(f"{out}/kept/best/checkpoint-1/{ADAPTER}"), run.adapter)
    state = json.loads(Path(out, "kept", "best", "checkpoint-6", "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == f"{out}/kept/best/checkpoint-1"


def test_a_run_that_was_stopped_keeps_what_it_goes_on_from(kept: list[dict[str, Any]], out: str) -> None:
    """With a limit of one, upstream removes the newest at the end of training: only the best counts then."""
    for result in kept:
        assert result["code"] == 75
        assert result["stopped left"] == ["checkpoint-1", "checkpoint-3"]
        assert result["stopped, resumed"].losses == result["best"].losses
        assert_same(result["stopped, resumed"].adapter, result["best"].adapter)
    assert [line for line in kept[0]["said"] if "SIGTERM received: saving after step 3" in line]
    assert [line for line in kept[0]["said"] if "evaluation that was due now is left out" in line]
    assert [line for line in kept[0]["said then"] if "Resuming from" in line and "checkpoint-3" in line]


def test_a_step_can_be_saved_twice(kept: list[dict[str, Any]], out: str) -> None:
    for result in kept:
        first, second = result["twice"]
        assert second[:2] == first and len(second) == 3
        assert result["twice left"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert verify(f"{out}/kept/twice/checkpoint-2")


# ---- Elastic ---------------------------------------------------------------------------------------------------------

ELASTIC_STEPS, ELASTIC_AT = 6, 3  # four steps an epoch


def train_elastic(rank: int, folder: str, out: str, accumulation: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train with a global batch of four, from a checkpoint if one is named; note what was loaded."""
    from transformers import TrainerCallback

    from hf_qlora_fsdp import QLoRAFSDPTrainer

    loaded: dict[str, Any] = {}

    class Witness(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loaded["states"] = optimizer_states(trainer)
            loaded["adapter"] = training.adapter_of(trainer.model)

    changes = dict(changes)
    resume = changes.pop("resume", None)
    given = saving(out, max_steps=ELASTIC_STEPS, gradient_accumulation_steps=accumulation) | changes
    trainer: QLoRAFSDPTrainer = training.ours(folder, training.equal_rows(16), given, callbacks=[Witness()])
    with training.listening() as said:
        run = training.run(trainer, resume_from_checkpoint=resume)
    return {"run": run, "said": said, **loaded}


@pytest.fixture(scope="module")
def elastic(ranks: RankPool, folder: str, out: str) -> dict[str, Any]:
    """Save on two ranks, offloaded; go on with one and four, resident, and with two."""
    results = {"saved": ranks.run(train_elastic, folder, f"{out}/elastic", 2, {"cpu_offload": True})[0]}
    rest = {"resume": f"{out}/elastic/checkpoint-{ELASTIC_AT}", "save_strategy": "no"}
    results["two"] = ranks.run(train_elastic, folder, f"{out}/elastic-2", 2, rest)[0]
    results["one"] = training.alone().run(train_elastic, folder, f"{out}/elastic-1", 4, rest)[0]
    with RankPool(world_size=4) as four:
        results["four"] = four.run(train_elastic, folder, f"{out}/elastic-4", 1, rest)[0]
    return results


@pytest.mark.parametrize("world", ["one", "two", "four"])
def test_another_number_of_ranks_loads_the_same_bits(elastic: dict[str, Any], out: str, world: str) -> None:
    checkpoint = Path(out, "elastic", f"checkpoint-{ELASTIC_AT}")
    states = {name.replace("::", " "): tensor for name, tensor in load_file(checkpoint / OPTIMIZER).items()}
    assert len(states) == 28 * 3
    assert_same(elastic[world]["states"], states)
    assert_same(elastic[world]["adapter"], load_file(checkpoint / ADAPTER))


@pytest.mark.parametrize("world", ["one", "two", "four"])
def test_another_number_of_ranks_goes_on_with_the_same_run(elastic: dict[str, Any], world: str) -> None:
    saved, resumed = elastic["saved"]["run"], elastic[world]["run"]
    rel = 0 if world == "two" else ELASTIC_STEPS * 256**0.5 * 2**-24
    assert len(resumed.losses) == ELASTIC_STEPS
    assert resumed.losses == pytest.approx(saved.losses, rel=rel, abs=0)
    assert resumed.grad_norms == pytest.approx(saved.grad_norms, rel=rel, abs=0)
    anew = [line for line in elastic[world]["said"] if "another number of ranks" in line]
    assert bool(anew) == (world != "two")


# ---- What is not continued -------------------------------------------------------------------------------------------


class Bomb:
    """Pickles to something that makes a file when it is loaded."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def craft(checkpoint: Path, copy: Path, marker: str, name: str | None, *removed: str) -> None:
    """Copy a checkpoint, with files that execute code when they are unpickled, or with one in another's place."""
    shutil.copytree(checkpoint, copy)
    facts = verify(copy)
    for old in removed:
        (copy / old).unlink()
    bomb = pickle.dumps(Bomb(marker))
    rest = ["training_args.bin", "scheduler.pt", "optimizer.pt", "optimizer.bin", "rng_state_0.pth", "rng_state.pth"]
    for new in [name] if name else [*rest, "pytorch_model.bin", "adapter_model.bin", "scaler.pt"]:
        (copy / new).write_bytes(bomb)
        torch.save(Bomb(marker), copy / f"zipped-{new}")
        if name is None:
            shutil.move(copy / f"zipped-{new}", copy / new)
    seal(copy, facts)


def be_refused(rank: int, folder: str, other: str, hub: str, out: str) -> dict[str, Any]:
    checkpoint = Path(out, "run", "checkpoint-2")
    rows = training.equal_rows(8)
    changes = saving(f"{out}/other", save_strategy="no")

    def resume(
        model: str = folder, peft: dict[str, Any] | None = None, path: Any = checkpoint, **more: Any
    ) -> tuple[str, str]:
        return training.refusal(training.ours(model, rows, changes | more, peft).train, str(path))

    whole = training.run(training.ours(folder, rows, saving(f"{out}/run")))
    markers = [f"{out}/bomb-{index}" for index in range(3)]
    if rank == 0:
        craft(checkpoint, Path(out, "bombs"), markers[0], None)
        craft(checkpoint, Path(out, "bin"), markers[1], "adapter_model.bin", ADAPTER)
        craft(checkpoint, Path(out, "optimizer"), markers[2], OPTIMIZER, OPTIMIZER)
        shutil.copytree(checkpoint, Path(out, "unsealed"))
        Path(out, "unsealed", MANIFEST).unlink()
    torch.distributed.barrier()
    results: dict[str, Any] = {
        "base": resume(other),
        "precision": resume(param_dtype="bfloat16"),
        "r": resume(peft={"r": 4}),
        "alpha": resume(peft={"lora_alpha": 32}),
        "alpha of one": resume(peft={"alpha_pattern": {"q_proj": 1}}),
        "targets": resume(peft={"target_modules": ["q_proj", "v_proj"]}),
        "head": resume(peft={"modules_to_save": ["lm_head"]}),
        "dora": resume(peft={"use_dora": True}),
        "rows": resume(peft={"trainable_token_indices": [7, 9]}),
        "batch": resume(per_device_train_batch_size=2),
        "unsealed": resume(path=Path(out, "unsealed")),
        "nowhere": resume(path=Path(out, "nowhere")),
        "adapter_model.bin": resume(path=Path(out, "bin")),
        "pickled optimizer": resume(path=Path(out, "optimizer")),
    }
    started_over = training.ours(folder, rows, changes | {"per_device_train_batch_size": 2, "ignore_data_skip": True})
    results["ignored"] = len(training.run(started_over, resume_from_checkpoint=str(checkpoint)).losses)
    for name, data in {"longer": training.equal_rows(12), "reversed": rows.select(range(7, -1, -1))}.items():
        with training.listening() as said:
            other = training.run(training.ours(folder, data, changes), resume_from_checkpoint=str(checkpoint))
        results[name] = ([line for line in said if "other data" in line], other.losses)
    cached = saving(f"{out}/hub", max_steps=1) | {"model_init_kwargs": {"cache_dir": hub}}
    training.run(training.ours("org/name", rows, cached))
    results["facts"] = verify(f"{out}/hub/checkpoint-1")
    if rank == 0:
        (Path(out, "run", "checkpoint-4") / OPTIMIZER).write_bytes(b"cut short")
    with training.listening() as said:
        passed_over = training.ours(folder, rows, saving(f"{out}/run", save_strategy="no"))
        results["passed over"] = (said, training.run(passed_over, resume_from_checkpoint=True).losses)
    bombed = training.run(training.ours(folder, rows, changes), resume_from_checkpoint=f"{out}/bombs")
    results["losses"] = (whole.losses, bombed.losses)
    return results | {"exploded": [marker for marker in markers if os.path.exists(marker)]}


@pytest.fixture(scope="module")
def refused(ranks: RankPool, folder: str, out: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    other = make_checkpoint(tmp_path_factory.mktemp("other"), dtype=torch.float32, seed=1)
    hub = tmp_path_factory.mktemp("hub")
    shutil.copytree(other, hub / "models--org--name" / "snapshots" / COMMIT)
    (hub / "models--org--name" / "refs").mkdir()
    (hub / "models--org--name" / "refs" / "main").write_text(COMMIT)
    return ranks.run(be_refused, folder, other, str(hub), f"{out}/refused")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("base", ["was trained on '", "/tiny", "model now is '", "/other", "(weights ", "revision and quantisation"]),
        ("precision", ["(weights ", "revision and quantisation"]),
        ("r", ["r=8", "now has 4", "Set r=8"]),
        ("alpha", ["lora_alpha=16", "now has 32"]),
        ("alpha of one", ["alpha_pattern={}", "{'q_proj': 1}"]),
        ("targets", ["layers.0.mlp.down_proj'", "now has ['q_proj', 'v_proj']", "Set target_modules="]),
        ("head", ["modules_to_save=[]", "['lm_head']"]),
        ("dora", ["use_dora=False", "now has True"]),
        ("batch", ["2 sequences a step (2 ranks)", "has 4 (2 ranks)", "ignore_data_skip=True"]),
        ("unsealed", [MANIFEST, "resume_from_checkpoint=True"]),
        ("nowhere", ["nowhere", MANIFEST]),
        ("adapter_model.bin", [f"no {ADAPTER}"]),
        ("rows", ["trainable_token_indices=None", "now has [7, 9]"]),
    ],
)
def test_refused_on_all_ranks(refused: list[dict[str, Any]], case: str, words: list[str]) -> None:
    kind, message = refused[0][case]
    assert kind == "ValueError", message
    for word in words:
        assert word in message
    assert refused[1][case][0] in ("ValueError", "RankError")


def test_a_checkpoint_says_what_it_belongs_to(refused: list[dict[str, Any]]) -> None:
    facts = refused[0]["facts"]
    assert (facts["base_model"], facts["revision"]) == ("org/name", COMMIT)
    assert (facts["world_size"], facts["sequences_per_step"], facts["data"]["num_rows"]) == (2, 2, 8)
    assert facts["adapters"]["default"]["r"] == 8
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    assert {name: facts["versions"][name] for name in libraries} == {name: version(name) for name in libraries}


def test_a_damaged_checkpoint_is_passed_over_and_named(refused: list[dict[str, Any]]) -> None:
    said, losses = refused[0]["passed over"]
    (line,) = (line for line in said if line.startswith("Passed over: "))
    assert f"{OPTIMIZER} in " in line and "run/checkpoint-4' is not the file that was saved" in line
    assert [line for line in said if line.startswith("Resuming from ") and line.endswith("run/checkpoint-3.")]
    assert losses == refused[0]["losses"][0]


def test_data_may_be_started_over_with_another_batch(refused: list[dict[str, Any]]) -> None:
    assert refused[0]["ignored"] == 4


@pytest.mark.parametrize(("case", "words"), [("longer", "8 rows then, 12 now"), ("reversed", "not in the same order")])
def test_other_data_are_gone_on_with_and_said(refused: list[dict[str, Any]], case: str, words: str) -> None:
    (line,) = refused[0][case][0]
    assert "checkpoint-2 was saved in a run on other data: " in line and words in line and "ignore_data_skip" in line
    assert refused[1][case][0] == [], "one rank speaks"
    for result in refused:
        losses = result[case][1]
        assert len(losses) == 4 and losses[:2] == result["losses"][0][:2] and losses[2:] != result["losses"][0][2:]


def test_pickles_are_never_executed(refused: list[dict[str, Any]], tmp_path: Path) -> None:
    for result in refused:
        assert result["exploded"] == []
        assert result["losses"][0] == result["losses"][1], "with the bombs beside it, the checkpoint is as good as ever"
        assert result["pickled optimizer"][0] not in ("nothing", "UnpicklingError")
    with pytest.raises(FileNotFoundError):  # the bomb works: it tries to make a folder where none can be
        pickle.loads(pickle.dumps(Bomb(str(tmp_path / "no" / "such"))))


# ---- Numbers that are none -------------------------------------------------------------------------------------------

POISONS: dict[str, dict[str, Any]] = {
    "stop": {},
    "stop, no clipping": {"max_grad_norm": 0.0},
    "stop, first micro-step": {"gradient_accumulation_steps": 2},
    "skip": {"on_nonfinite": "skip"},
    "skip, no clipping": {"on_nonfinite": "skip", "max_grad_norm": 0.0},
}


def poison(rank: int, folder: str, out: str) -> dict[str, dict[str, Any]]:
    """Let the first loss of step 3 be none on rank 1."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    class Poisoned(QLoRAFSDPTrainer):
        poisoned = False

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 2 and rank == 1 and not self.poisoned:
                self.poisoned = True
                return loss * float("nan")
            return loss

    results = {}
    for index, (name, changes) in enumerate(POISONS.items()):
        adapters = []

        class Witness(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, adapters=adapters, **kwargs: Any) -> None:
                adapters.append(training.adapter_of(kwargs["model"]))

        args = QLoRAFSDPConfig(**training.arguments(**saving(f"{out}/{index}", max_steps=5, save_steps=2) | changes))
        trainer = Poisoned(
            folder,
            args,
            train_dataset=training.equal_rows(16),
            peft_config=LoraConfig(**training.LORA),
            callbacks=[Witness()],
        )
        with training.listening() as said:
            refusal = training.refusal(trainer.train)
        results[name] = {"refusal": refusal, "adapters": adapters, "said": said}
        results[name]["updates"] = {float(s["step"]) for s in trainer.optimizer.optimizer.state.values()}
    return results


@pytest.fixture(scope="module")
def poisoned(ranks: RankPool, folder: str, out: str) -> list[dict[str, dict[str, Any]]]:
    return ranks.run(poison, folder, f"{out}/poisoned")


@pytest.mark.parametrize("name", [name for name in POISONS if name.startswith("stop")])
def test_all_ranks_stop_before_the_step(poisoned: list[dict[str, dict[str, Any]]], out: str, name: str) -> None:
    checkpoint = f"{out}/poisoned/{list(POISONS).index(name)}/checkpoint-2"
    for result in (results[name] for results in poisoned):
        kind, message = result["refusal"]
        assert kind == "NonFiniteError", message
        assert "nan at step 3" in message and "loss of rank 1 is nan" in message and checkpoint in message
        assert len(result["adapters"]) == 2 and result["updates"] == {2.0}


@pytest.mark.parametrize("name", [name for name in POISONS if name.startswith("skip")])
def test_the_step_is_skipped_and_training_goes_on(poisoned: list[dict[str, dict[str, Any]]], name: str) -> None:
    for result in (results[name] for results in poisoned):
        assert result["refusal"] == ("nothing", "it went through")
        second, third, fourth = result["adapters"][1:4]
        assert_same(second, third)
        assert any(not torch.equal(third[n], fourth[n]) for n in third)
        assert all(tensor.isfinite().all() for tensor in result["adapters"][-1].values())
        assert len(result["adapters"]) == 5 and result["updates"] == {4.0}
    assert len([line for line in poisoned[0][name]["said"] if "step 3; the loss of rank 1 is nan" in line]) == 1


def train_scaled(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Train with a loss scaler, as float16 does; accelerate allows it on GPUs only, so it is put in its place here."""
    from transformers import TrainerCallback

    results: dict[str, Any] = {}

    class Witness(TrainerCallback):
        def __init__(self) -> None:
            self.scales: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.scales.append(trainer.accelerator.scaler.get_scale())

    def start(name: str, scale: float, **more: Any) -> Any:
        trainer = training.ours(
            folder, training.equal_rows(16), saving(f"{out}/{name}", max_steps=6) | more, callbacks=[Witness()]
        )
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        compute_loss = trainer.compute_loss

        def compute(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            if name == "nan" and trainer.state.global_step == 3 and rank == 1:
                return loss * float("nan")
            if name == "collapse":
                loss.register_hook(lambda grad: grad * float("inf"))
            return loss

        trainer.compute_loss = compute
        return trainer

    for name, scale in {"overflow": 2.0**127, "nan": 8.0, "collapse": 8.0}.items():
        trainer = start(name, scale)
        refusal = training.refusal(trainer.train)
        witness = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "Witness")
        results[name] = {
            "refusal": refusal,
            "scales": witness.scales,
            "updates": {float(s["step"]) for s in trainer.optimizer.optimizer.state.values()},
            "adapter": training.adapter_of(trainer.model),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
    trainer = start("resumed", 1.0, save_strategy="no")
    run = training.run(trainer, resume_from_checkpoint=f"{out}/overflow/checkpoint-4")
    results["resumed"] = {"run": run, "scale": trainer.accelerator.scaler.get_scale()}
    return results


@pytest.fixture(scope="module")
def scaled(ranks: RankPool, folder: str, out: str) -> list[dict[str, Any]]:
    return ranks.run(train_scaled, folder, f"{out}/scaled")


def test_a_loss_scaler_is_left_to_its_work(scaled: list[dict[str, Any]]) -> None:
    """It halves its scale until gradients are finite, and doubles it after three such steps."""
    for result in (results["overflow"] for results in scaled):
        assert result["refusal"] == ("nothing", "it went through")
        scales = result["scales"]
        assert len(scales) == 6 and scales[0] == 2.0**126, "the first step overflows"
        num_skipped = sum(after < before for before, after in zip([2.0**127, *scales], scales, strict=False))
        assert 0 < num_skipped < 6 and result["updates"] == {6.0 - num_skipped}
        assert all(tensor.isfinite().all() for tensor in result["adapter"].values())


def test_a_loss_scaler_is_resumed(scaled: list[dict[str, Any]]) -> None:
    for results in scaled:
        whole, resumed = results["overflow"], results["resumed"]
        assert resumed["run"].losses == whole["losses"] and resumed["scale"] == whole["scales"][-1]
        assert_same(resumed["run"].adapter, whole["adapter"])


def test_a_loss_scaler_does_not_hide_numbers_that_are_none(scaled: list[dict[str, Any]], out: str) -> None:
    for results in scaled:
        kind, message = results["nan"]["refusal"]
        assert kind == "NonFiniteError" and "step 4; the loss of rank 1 is nan" in message, message
        assert f"{out}/scaled/nan/checkpoint-3" in message and results["nan"]["updates"] == {3.0}
        kind, message = results["collapse"]["refusal"]
        assert kind == "NonFiniteError" and "loss scale has fallen to 1.0" in message, message
        assert results["collapse"]["scales"] == [4.0, 2.0, 1.0]


# ---- A disk that is full ---------------------------------------------------------------------------------------------

# Which write fails on rank 0, in the order in which they happen.
WRITERS = [
    "hf_qlora_fsdp.resuming.resumable.ResumableTrainer.create_model_card",
    "peft.PeftModel.save_pretrained",
    "transformers.PreTrainedTokenizerBase.save_pretrained",
    "hf_qlora_fsdp.export.save_file",
    "hf_qlora_fsdp.resuming.random_states.save_file",
    "transformers.TrainerState.save_to_json",
    "hf_qlora_fsdp.resuming.resumable.seal",
    "hf_qlora_fsdp.resuming.checkpoints.os.rename",
]
LIMITS = [100_000, 200_000]  # bytes a file: the adapter has 140 kB, the optimizer twice that


@contextlib.contextmanager
def failing(case: str | int) -> Iterator[None]:
    """Let a function fail, or every write beyond a size, for as long as a checkpoint is saved."""
    if isinstance(case, str):
        with mock.patch(case, side_effect=OSError(errno.ENOSPC, "No space left on device")):
            yield
        return
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (case, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def fill_the_disk(rank: int, folder: str, out: str, disk: str | None) -> dict[str, dict[str, Any]]:
    """Save step 1; let a write of step 2 fail."""
    results = {}
    cases: list[Any] = [disk] if disk else [*WRITERS, *LIMITS]
    for index, case in enumerate(cases):
        here = disk or f"{out}/{index}"
        changes = saving(here, max_steps=20 if disk else 3)
        trainer = training.ours(folder, training.equal_rows(8), changes)
        save = trainer._save_checkpoint

        def save_on_a_full_disk(*given: Any, case=case, trainer=trainer, save=save) -> None:
            with contextlib.ExitStack() as stack:
                if trainer.state.global_step == 2 and rank == 0 and disk is None:
                    stack.enter_context(failing(case))
                save(*given)

        trainer._save_checkpoint = save_on_a_full_disk
        with training.listening() as said:
            refusal = training.refusal(trainer.train)
        torch.distributed.barrier()
        newest, skipped = newest_valid(here)
        results[case] = {
            "refusal": refusal,
            "newest": newest and newest.name,
            "skipped": skipped,
            "left": sorted(path.name for path in Path(here).iterdir() if path.is_dir()),
            "step": trainer.state.global_step,
            "said": said,
        }
        if disk is None:
            rest = training.run(
                training.ours(folder, training.equal_rows(8), saving(here, max_steps=3)), resume_from_checkpoint=True
            )
            results[case]["losses"] = rest.losses
    return results


@pytest.fixture(scope="module")
def full(ranks: RankPool, folder: str, out: str) -> list[dict[Any, dict[str, Any]]]:
    return ranks.run(fill_the_disk, folder, f"{out}/full", None)


@pytest.mark.parametrize("case", [*WRITERS, *LIMITS])
def test_a_write_that_fails_leaves_the_previous_checkpoint(full: list[dict[Any, dict[str, Any]]], case: Any) -> None:
    reason = "File too large" if isinstance(case, int) else "No space left on device"
    for result in (results[case] for results in full):
        assert reason in result["refusal"][1], result["refusal"]
        assert result["left"] == ["checkpoint-1"] and result["newest"] == "checkpoint-1" and not result["skipped"]
        assert len(result["losses"]) == 3, "once there is room again, it goes on"
        assert result["losses"] == full[0][WRITERS[0]]["losses"]
    (line,) = (line for line in full[0][case]["said"] if "was not saved" in line)
    assert "checkpoint-2 was" in line and line.endswith("checkpoint-1.")
    assert full[1][case]["refusal"][0] == "RankError" and "Rank 0 failed" in full[1][case]["refusal"][1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A disk with room for one checkpoint and a half."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield str(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_is_really_full(ranks: RankPool, folder: str, out: str, small_disk: str) -> None:
    for results in ranks.run(fill_the_disk, folder, out, small_disk):
        result = results[small_disk]
        assert "No space left on device" in result["refusal"][1] or "(os error 28)" in result["refusal"][1]
        assert result["step"] == 2 and result["newest"] == "checkpoint-1" and not result["skipped"]
        assert result["left"] == ["checkpoint-1"]

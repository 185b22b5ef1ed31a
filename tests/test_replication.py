"""Layers that are left whole on every rank: the same bits, nothing gathered but adapters, and the room that it takes.

The model has more layers than are gathered together, so that there are two units of adapters and one of them is short.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from hf_qlora_fsdp.errors import DoesNotFitError, ShardingError
from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.loading.fitting import check_fits
from hf_qlora_fsdp.sharding import base_model, check_sharded
from hf_qlora_fsdp.sharding_policy import ADAPTERS_AT_ONCE, ShardingPolicy
from hf_qlora_fsdp.summary import describe
from tests import training
from tests.distributed import RankPool
from tests.test_sharding import INPUT_IDS, LORA, assert_identical, compute_sharded
from tests.tiny import make_checkpoint

NUM_LAYERS = ADAPTERS_AT_ONCE + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)


WAYS: list[dict[str, Any]] = [
    {"policy": {"replicate_layers": "all"}},
    {"policy": {"replicate_layers": "all"}, "checkpointing": True},
    {"policy": {"replicate_layers": 5}, "checkpointing": True},
    {"policy": {"replicate_layers": 3}, "reshard": False},
    {"policy": {"replicate_layers": "all"}, "how": "peft", "storage": torch.bfloat16},
    {"policy": {"replicate_layers": "all"}, "how": "adapter afterwards", "checkpointing": True},
]


SOME = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, NUM_LAYERS - 1]}


@pytest.mark.parametrize("lora", [{}, SOME], ids=["all adapted", "some adapted"])
def test_the_same_numbers(ranks: RankPool, folder: str, lora: dict[str, Any]) -> None:
    variants = [{"dtype": torch.bfloat16, **lora, **way} for way in ({}, *WAYS)]
    for first, *others in ranks.run(compute_sharded, folder, variants):
        assert all(gradient.any() for gradient in first["gradients"].values())
        for way, other in zip(WAYS, others, strict=True):
            try:
                assert_identical(other, first)
            except AssertionError as error:
                raise AssertionError(f"{way}: {error}") from error


def observe(rank: int, folder: str, replicate: int | str | None) -> dict[str, Any]:
    """Load a model, take a step, and return what this rank holds and what was gathered in it."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    policy = ShardingPolicy(replicate_layers=replicate)
    model: Any = load_quantized_model(folder, peft_config=LoraConfig(**LORA), policy=policy, progress=False)
    check_sharded(model, policy)
    gathered, gather = [], group.foreach_all_gather

    def count(params: list[Any], *rest: Any) -> Any:
        gathered.append(sorted({"lora" if "lora_" in param._param_fqn else param._param_fqn for param in params}))
        return gather(params, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "foreach_all_gather", count)
        model(input_ids=INPUT_IDS[rank : rank + 1], labels=INPUT_IDS[rank : rank + 1]).loss.backward()
    held: Counter[str] = Counter()
    whole = set()
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held["trained" if parameter.requires_grad else "layers" if ".layers." in name else "others"] += local.nbytes
        if not isinstance(parameter, DTensor):
            assert not parameter.requires_grad, name
            whole.add(int(name.split(".layers.")[1].split(".")[0]))
    refused = ""
    try:
        check_sharded(model, ShardingPolicy())
    except ShardingError as error:
        refused = str(error)
    return {"gathered": gathered, "held": held, "whole": sorted(whole), "refused": refused}


def test_nothing_is_gathered_but_adapters(ranks: RankPool, folder: str) -> None:
    for seen in ranks.run(observe, folder, "all"):
        of_layers = [names for names in seen["gathered"] if names == ["lora"]]
        assert len(of_layers) == 2, "once for all of a unit, and not again in the backward"
        others = [names for names in seen["gathered"] if names != ["lora"]]
        assert len(others) == 2 and not any(".layers." in name for names in others for name in names)


def test_some_layers_are_whole_and_what_is_trained_is_cut(ranks: RankPool, folder: str) -> None:
    cut, some, every = (ranks.run(observe, folder, replicate)[0] for replicate in (None, 5, "all"))
    assert cut["whole"] == [] and cut["refused"] == ""
    assert some["whole"] == [1, 3, 5, 7, 9] and every["whole"] == list(range(NUM_LAYERS))
    assert "is whole on every rank" in some["refused"]
    assert every["held"]["layers"] == 2 * cut["held"]["layers"]
    assert some["held"]["layers"] == 1.5 * cut["held"]["layers"]
    for name in ("trained", "others"):
        assert cut["held"][name] == some["held"][name] == every["held"][name]


def resume_and_run(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Train sharded; go on from the middle with layers whole, evaluating and saving on the way; run what is there."""
    saving = {"folder": out, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    sharded = training.run(training.ours(folder, training.equal_rows(8), saving))
    changes = saving | {"save_strategy": "no", "replicate_layers": "all", "eval_strategy": "steps", "eval_steps": 1}
    rows = {"eval_dataset": training.equal_rows(3)}
    trainer = training.ours(folder, training.equal_rows(8), changes, **rows)
    whole = training.run(trainer, resume_from_checkpoint=f"{out}/checkpoint-2")
    prompt = INPUT_IDS[:1, :5]
    words = trainer.model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False).tolist()
    trainer.save_model(f"{out}/whole")
    return {"sharded": sharded, "whole": whole, "words": words}


def test_a_run_may_go_on_with_layers_whole(ranks: RankPool, folder: str, tmp_path: Path) -> None:
    for result in ranks.run(resume_and_run, folder, str(tmp_path)):
        sharded, whole = result["sharded"], result["whole"]
        assert whole.losses == sharded.losses and len(whole.losses) == 4
        assert sharded.adapter.keys() == whole.adapter.keys()
        for name, tensor in sharded.adapter.items():
            assert torch.equal(whole.adapter[name], tensor), name
        saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        assert saved.keys() == {name.replace(".default.", ".") for name in sharded.adapter}
        assert len(result["words"][0]) == 9


def run_before_training(rank: int, folder: str, out: str, run: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Run a model, then train it; return how many of its adapter's tensors have changed, and how it is described."""
    rows = {"eval_dataset": training.equal_rows(3)}
    trainer = training.ours(folder, training.equal_rows(8), {"folder": out, "max_steps": 2, **changes}, **rows)
    before = training.adapter_of(trainer.model)
    if run == "evaluate":
        trainer.evaluate()
    else:
        trainer.model.generate(input_ids=INPUT_IDS[:1, :5], max_new_tokens=2, do_sample=False)
    after = training.run(trainer).adapter
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    policy = trainer.sharding_policy
    units = policy.plan_units(base_model(trainer.model))
    said = describe(trainer.model, units, policy.param_dtype, "none", [])
    return {"moved": len(moved), "of": len(before), "said": said}


@pytest.mark.parametrize("run", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("changes", "layers"),
    [({"replicate_layers": "all"}, " (10 whole on every rank),"), ({"reshard_after_forward": False}, ",")],
    ids=["replicated", "kept gathered"],
)
def test_what_runs_before_training_leaves_it_to_train(
    ranks: RankPool, folder: str, tmp_path: Path, run, changes, layers
):
    for result in ranks.run(run_before_training, folder, str(tmp_path), run, changes):
        assert result["moved"] == result["of"] > 0
        assert f"10 decoder layers{layers}" in result["said"]


def adopt(rank: int, folder: str, out: str, loaded: int | None, asked: int | None) -> tuple[str, str]:
    base = load_quantized_model(folder, policy=ShardingPolicy(replicate_layers=loaded), progress=False)
    changes = {"folder": out, "max_steps": 1, "replicate_layers": asked}
    return training.refusal(training.ours, base, training.equal_rows(4), changes)


@pytest.mark.parametrize(("loaded", "asked", "how"), [(None, 5, "cut"), (5, None, "whole on every rank")])
def test_a_model_that_was_cut_otherwise_is_refused(ranks: RankPool, folder: str, tmp_path: Path, loaded, asked, how):
    for kind, said in ranks.run(adopt, folder, str(tmp_path), loaded, asked):
        assert kind == "ShardingError"
        assert f"is {how}, and with replicate_layers={asked} it should not be" in said


def test_it_does_not_go_with_offloading() -> None:
    with pytest.raises(ValueError, match="replicate_layers='all' with offloading"):
        ShardingPolicy(replicate_layers="all", cpu_offload=True)


def need_of(rank: int, folder: str, replicate: int | str | None) -> Any:
    """Return what loading was expected to take."""
    from hf_qlora_fsdp import loader

    needs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "check_fits", lambda name, need, *rest: needs.append(need))
        policy = ShardingPolicy(replicate_layers=replicate)
        model: nn.Module = load_quantized_model(folder, policy=policy, progress=False)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in base_model(model).parameters())
    return needs[0], held


@pytest.mark.parametrize("replicate", [None, 5, "all"])
def test_the_room_it_takes_is_asked_for(ranks: RankPool, folder: str, replicate: int | str | None) -> None:
    needs = {}
    for cut in (None, replicate):
        for need, held in ranks.run(need_of, folder, cut):
            assert need.resident_bytes == held
            needs[cut] = need
    assert needs[replicate].resident_bytes - needs[None].resident_bytes == needs[replicate].replicated_bytes // 2
    with pytest.raises(DoesNotFitError) as error:
        check_fits("a model", needs[replicate], "cuda", {"cuda": 0})
    assert ("Write a smaller replicate_layers" in str(error.value)) == (replicate is not None)

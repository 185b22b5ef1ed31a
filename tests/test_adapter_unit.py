"""Adapters as one unit: they keep their places and names, are gathered once a step, and reduced once.

That no bit of a training depends on it is in test_trainer.py, also after running out of memory (test_checkpointing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint


def counting(function: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    """Note with how many parameters a function of FSDP's is called."""

    def count(parameters: Any, *args: Any, **named: Any) -> Any:
        sizes.append(len(parameters))
        return function(parameters, *args, **named)

    return count


def count_what_is_exchanged(rank: int, folder: str, out: str) -> dict[bool, dict[str, Any]]:
    """Train two steps both ways; say what is exchanged in them, and what the model looks like from outside."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    seen: dict[bool, dict[str, Any]] = {}
    for once in (False, True):
        changes = {"folder": out, "max_steps": 2, "gather_adapters_once": once}
        trainer = training.ours(folder, training.equal_rows(8), changes)
        counted: dict[str, list[int]] = {"foreach_all_gather": [], "foreach_reduce": []}
        with pytest.MonkeyPatch.context() as patch:
            for name in counted:
                patch.setattr(_fsdp_param_group, name, counting(getattr(_fsdp_param_group, name), counted[name]))
            trainer.train()
        seen[once] = counted | {
            "names": sorted(name for name, _ in trainer.model.named_parameters()),
            "state": sorted(trainer.model.state_dict()),
        }
    return seen


def test_adapters_are_gathered_once_a_step_and_reduced_once(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    out = str(tmp_path_factory.mktemp("out"))
    for seen in ranks.run(count_what_is_exchanged, folder, out):
        with_layers, once = seen[False], seen[True]
        assert with_layers["names"] == once["names"] and with_layers["state"] == once["state"]
        num_layers, num_lora = 2, 2 * 7 * 2
        assert with_layers["foreach_reduce"] == 2 * num_layers * [num_lora // num_layers]
        assert once["foreach_reduce"] == 2 * [num_lora]
        assert once["foreach_all_gather"].count(num_lora) == 2
        in_layers = len(with_layers["foreach_all_gather"])
        assert len(once["foreach_all_gather"]) == in_layers + 2
        assert sum(once["foreach_all_gather"]) == sum(with_layers["foreach_all_gather"]) - 2 * num_lora


def add_to_a_sharded_model(rank: int, folder: str, out: str) -> int:
    """Give an adapter to a model that was sharded without one, whose adapters are units of their own otherwise."""
    from hf_qlora_fsdp import load_quantized_model
    from hf_qlora_fsdp.speed.fusion import FusedLora

    changes = {"folder": out, "max_steps": 2, "gather_adapters_once": True}
    trainer = training.ours(load_quantized_model(folder), training.equal_rows(8), changes)
    trainer.train()
    return sum(isinstance(module.forward, FusedLora) for module in trainer.model.modules())


def test_an_adapter_that_comes_later_runs_fused(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    for seen in ranks.run(add_to_a_sharded_model, folder, str(tmp_path_factory.mktemp("out"))):
        assert seen == 2 * 7


def test_it_does_not_go_with_adapters_on_the_host() -> None:
    from hf_qlora_fsdp import QLoRAFSDPConfig

    with pytest.raises(ValueError, match="gather_adapters_once=True with cpu_offload_trainable=True"):
        QLoRAFSDPConfig(output_dir="out", gather_adapters_once=True, cpu_offload_trainable=True, use_cpu=True)

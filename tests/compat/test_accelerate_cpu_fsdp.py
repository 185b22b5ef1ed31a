"""The patch `accelerate-cpu-fsdp`: upstream without it (expected to fail), with it, and without it again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hf_qlora_fsdp import compat
from hf_qlora_fsdp.compat.accelerate_cpu_fsdp import PATCH
from hf_qlora_fsdp.errors import PatchError
from tests import training
from tests.distributed import RankPool


def adopt_plugin(rank: int, mixed_precision: str = "bf16") -> dict[str, Any]:
    """Make an `Accelerator` on CPU ranks with an FSDP2 plugin, and say what became of it."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed_precision)
    adopted = getattr(accelerator.state, "fsdp_plugin", None)
    return {
        "type": accelerator.distributed_type.value,
        "adopted": adopted is plugin,
        "is_fsdp2": accelerator.is_fsdp2,
        "param_dtype": str(plugin.mixed_precision_policy.param_dtype) if plugin.mixed_precision_policy else None,
    }


RIGHT = {"type": "FSDP", "adopted": True, "is_fsdp2": True, "param_dtype": "torch.bfloat16"}


def unpatched(rank: int) -> dict[str, Any]:
    compat.revert(PATCH)
    return adopt_plugin(rank)


def patched(rank: int) -> tuple[dict[str, Any], list[str]]:
    with training.listening() as said:
        compat.revert(PATCH)
        compat.apply(PATCH)
        compat.apply(PATCH)
    try:
        return adopt_plugin(rank), said
    finally:
        compat.revert(PATCH)


def reverted(rank: int) -> tuple[bool, bool]:
    from accelerate.state import AcceleratorState

    compat.revert(PATCH)
    original = AcceleratorState.__init__
    compat.apply(PATCH)
    changed = AcceleratorState.__init__ is not original and PATCH.name in compat.active_patches()
    compat.revert(PATCH)
    compat.revert(PATCH)
    return changed and AcceleratorState.__init__ is original, PATCH.name in compat.active_patches()


@pytest.mark.xfail(strict=True, reason=f"delete the patch when this passes: {PATCH.remove_when}", raises=AssertionError)
def test_upstream_adopts_fsdp_on_the_cpu(ranks: RankPool) -> None:
    assert ranks.run(unpatched) == [RIGHT, RIGHT]


def test_patched_accelerate_adopts_fsdp_on_the_cpu(ranks: RankPool) -> None:
    (first, said), (second, silence) = ranks.run(patched)
    assert first == second == RIGHT
    assert len(said) == 1, "applied twice, said once"
    assert PATCH.name in said[0]
    assert silence == []


def test_one_process_of_a_group_is_fsdp_too() -> None:
    result, _ = training.alone().run(patched)[0]
    assert result == RIGHT


def test_revert_puts_the_original_back(ranks: RankPool) -> None:
    assert ranks.run(reverted) == [(True, False), (True, False)]


@pytest.mark.parametrize(
    "target",
    ["accelerate.state:AcceleratorState.__start__", "accelerate.state:Missing.__init__", "accelerate.gone:A.b"],
)
def test_a_missing_target_is_an_error(target: str) -> None:
    patch = dataclasses.replace(PATCH, name="elsewhere", target=target)
    with pytest.raises(PatchError, match=r"elsewhere replaces .*, which accelerate \d.* does not have\. Install"):
        compat.apply(patch)
    assert "elsewhere" not in compat.active_patches()


@pytest.mark.parametrize(
    ("affects", "needed"),
    [("accelerate>=1.15", True), ("accelerate<1.15", False), ("accelerate>=1.15,<99", True), ("accelerate>=99", False)],
)
def test_is_needed_follows_the_version(monkeypatch: pytest.MonkeyPatch, affects: str, needed: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.15.0")
    patch = dataclasses.replace(PATCH, affects=affects)
    assert patch.is_needed == needed


def test_a_patch_that_is_not_needed_is_not_applied() -> None:
    patch = dataclasses.replace(PATCH, name="not needed", affects="accelerate>=99", target="nowhere:at.all")
    compat.apply(patch)
    assert "not needed" not in compat.active_patches()

"""What is gathered is what was sharded, bit for bit, whatever number the bits would be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_qlora_fsdp import compat
from hf_qlora_fsdp.compat.torch_gather_bytes import PATCH
from hf_qlora_fsdp.errors import ShardingError
from tests.distributed import RankPool


def gather_all_patterns(rank: int, patched: bool) -> bool:
    """Return whether every pattern of 16 bits survives being sharded and gathered as bfloat16."""
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    compat.apply(PATCH) if patched else compat.revert(PATCH)
    patterns = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.int16)
    module = nn.Linear(4, 4, device=device)  # a trained layer beside it, as in a decoder layer
    module.packed = nn.Parameter(patterns.view(torch.bfloat16).clone(), requires_grad=False)
    fully_shard(module.bfloat16())
    module.unshard()
    survived = torch.equal(module.packed.view(torch.int16), patterns)
    compat.revert(PATCH)
    return survived


@pytest.mark.multigpu
@pytest.mark.filterwarnings("default")
@pytest.mark.xfail(strict=True, reason="torch._foreach_copy_ makes all NaNs one; if this passes, delete the patch")
def test_upstream_still_broken() -> None:
    with RankPool(world_size=2, backend="cpu:gloo,cuda:nccl") as gpus:
        assert all(gpus.run(gather_all_patterns, False))


@pytest.mark.multigpu
@pytest.mark.filterwarnings("default")
def test_patch_fixes_it() -> None:
    with RankPool(world_size=2, backend="cpu:gloo,cuda:nccl") as gpus:
        assert all(gpus.run(gather_all_patterns, True))


@pytest.mark.parametrize("patched", [False, True])
def test_cpus_gather_bits_with_it_and_without(ranks: RankPool, patched: bool) -> None:
    assert all(ranks.run(gather_all_patterns, patched))


def make_mesh_with_a_copy_that_changes_nan(rank: int) -> str:
    """Put a copy in the place of torch's that does to NaN what the one on GPUs does."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    from hf_qlora_fsdp.mesh import make_mesh

    original = _fsdp_collectives._get_param_all_gather_inputs

    def change(fsdp_params):
        inputs = original(fsdp_params)
        return [[torch.where(t.isnan(), torch.full_like(t, float("nan")), t) for t in ts] for ts in inputs]

    _fsdp_collectives._get_param_all_gather_inputs = change
    try:
        make_mesh()
    except ShardingError as error:
        return str(error)
    finally:
        _fsdp_collectives._get_param_all_gather_inputs = original
    return "accepted"


def test_a_machine_that_changes_bytes_is_refused(ranks: RankPool) -> None:
    for said in ranks.run(make_mesh_with_a_copy_that_changes_nan):
        assert "changes bytes while it gathers bfloat16 on cpu" in said

"""Clipping and Adam on shards: the numbers of whole tensors, and state that is still sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_qlora_fsdp.speed.shard_steps import clip_gradients, step_on_shards
from tests.distributed import RankPool

SHAPES = [(5, 3), (1, 7), (4, 2)]  # over two ranks: uneven, nothing on the second one, even
STEPS = 3


def make_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [*SHAPES, (6,)]]


def train(parameters: list[nn.Parameter], gradients: Any, optimizer: Any, clip: Any) -> list[float]:
    """Take some steps with given gradients, and return their norms."""
    norms = []
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        norms.append(float(clip(parameters)))
        optimizer.step()
    return norms


def train_sharded(rank: int, max_norm: float, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))

    def spread(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        *sharded, whole = tensors
        return [*(distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in sharded), whole]

    parameters = [nn.Parameter(tensor) for tensor in spread(make_tensors(0))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01, **options)
    step_on_shards(optimizer)
    norms = train(
        parameters, lambda step: spread(make_tensors(1 + step)), optimizer, lambda p: clip_gradients(p, max_norm)
    )
    moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    sharded = [isinstance(tensor, DTensor) for tensor in moments]
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (*parameters, *moments)]
    return {"norms": norms, "sharded": sharded, "whole": [tensor.detach().clone() for tensor in whole]}


@pytest.mark.parametrize("max_norm", [1.0, float("inf")])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_steps_are_those_of_whole_tensors(ranks: RankPool, max_norm: float, options: dict[str, Any]) -> None:
    parameters = [nn.Parameter(tensor) for tensor in make_tensors(0)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01, **options)
    norms = train(
        parameters,
        lambda step: make_tensors(1 + step),
        optimizer,
        lambda p: nn.utils.clip_grad_norm_(p, max_norm),
    )
    expected = [*parameters, *(optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters)]
    for result in ranks.run(train_sharded, max_norm, options):
        assert result["sharded"] == [True, True, True, False]
        assert result["norms"] == pytest.approx(norms, rel=4 * torch.finfo(torch.float32).eps)
        for mine, theirs in zip(result["whole"], expected, strict=True):
            # The norm is summed in another order, and a fused kernel rounds the rest of a vector in its own way.
            if max_norm == 1.0 or options.get("fused"):
                assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(mine, theirs)


def test_other_optimizers_are_left_alone() -> None:
    for make in (torch.optim.SGD, torch.optim.Adafactor, type("Mine", (torch.optim.AdamW,), {})):
        optimizer = make([nn.Parameter(torch.zeros(2))], lr=0.1)
        step_on_shards(optimizer)
        assert "_init_group" not in vars(optimizer)


def test_nothing_to_clip() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_none_show_in_the_norm(value: float) -> None:
    """And stay what they are where nothing is to be clipped; clipped, they spread, as with torch."""
    for max_norm in (1.0, float("inf")):
        mine, theirs = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        for parameter in (mine, theirs):
            parameter.grad = torch.tensor([1.0, value, -2.0])
        expected = nn.utils.clip_grad_norm_([theirs], max_norm)
        assert torch.equal(clip_gradients([mine], max_norm).isnan(), expected.isnan()) and not expected.isfinite()
        unclipped = torch.tensor([1.0, value, -2.0])
        assert torch.allclose(mine.grad, theirs.grad if max_norm == 1.0 else unclipped, equal_nan=True)

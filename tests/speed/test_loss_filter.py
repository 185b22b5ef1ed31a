"""A loss that is no number is logged as transformers would log it, and no loss is read on its way into the log.

One micro-batch's loss is spoilt on one rank, and its step is skipped. The reference is the same run with the filter of
transformers, or, where nothing is to be filtered, with none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_qlora_fsdp.speed.loss_filter import LossFilter
from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

SPOILT = 7  # of the second step since the last log, so that the average is one of two


class Loss(torch.Tensor):
    """Counts how often somebody asks what it, or what comes of it, is."""

    num_reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Loss.num_reads += func in (torch.Tensor.__bool__, torch.Tensor.item)
        return super().__torch_function__(func, types, args, kwargs)


def train(rank: int, folder: str, out: str, value: float, is_filtering: bool, ours: bool) -> dict[str, Any]:
    changes = {
        "folder": out,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "on_nonfinite": "skip",
        "logging_nan_inf_filter": is_filtering,
    }
    trainer = training.ours(folder, training.equal_rows(16), changes)
    step, compute, count_operations = trainer.training_step, trainer.compute_loss, trainer.floating_point_ops
    calls, reads, said = [], [], []

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return compute(*args, **kwargs) * (value if len(calls) == SPOILT and rank == 1 else 1)

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs).as_subclass(Loss)
        Loss.num_reads = 0
        return loss

    def floating_point_ops(inputs: Any) -> Any:  # called when upstream has added up the loss
        reads.append(Loss.num_reads)
        trainer._tr_loss = trainer._tr_loss.as_subclass(torch.Tensor)
        num_operations = count_operations(inputs)
        said.append(trainer.args.logging_nan_inf_filter)
        return num_operations

    trainer.compute_loss, trainer.training_step, trainer.floating_point_ops = (
        compute_loss,
        training_step,
        floating_point_ops,
    )
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(LossFilter, "filter", lambda self, loss: loss)
        run = training.run(trainer)
    return {"losses": [*run.losses, run.log[-1]["train_loss"]], "reads": reads, "said": said}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_filtering", [True, False])
def test_what_is_logged_is_what_transformers_logs(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, value: float, is_filtering: bool
) -> None:
    folder, out = make_checkpoint(tmp_path_factory.mktemp("model")), str(tmp_path_factory.mktemp("out"))
    theirs = ranks.run(train, folder, out, value, is_filtering, False)
    for mine, reference in zip(ranks.run(train, folder, out, value, is_filtering, True), theirs, strict=True):
        assert len(mine["losses"]) == 3 and str(mine["losses"]) == str(reference["losses"])  # nan is not itself
        assert ("nan" in str(mine["losses"]) or "inf" in str(mine["losses"])) is not is_filtering
        assert mine["reads"] == [0] * 8 and all(reference["reads"]) is is_filtering
        assert mine["said"] == [is_filtering] * 8


def step_by_hand_and_fail(rank: int, folder: str, out: str) -> list[Any]:
    """Take a step without `train`, end a training after a loss, and train with operations counted in another way."""
    from hf_qlora_fsdp import QLoRAFSDPTrainer

    trainer = training.ours(folder, training.equal_rows(4), {"folder": out, "max_steps": 2})
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad()
    said = [bool(loss > 0), trainer.args.logging_nan_inf_filter]

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        QLoRAFSDPTrainer.training_step(trainer, *args, **kwargs)
        raise KeyError("of a script's own")

    trainer.training_step = training_step
    said += [training.refusal(trainer.train)[0], trainer.args.logging_nan_inf_filter]
    del trainer.training_step
    nothing, seen = torch.tensor(float("nan")), []
    trainer.floating_point_ops = lambda inputs: seen.append(bool(trainer.loss_filter.filter(nothing).isfinite())) or 0
    trainer.train()
    return [*said, seen, trainer.args.logging_nan_inf_filter]


def test_arguments_are_left_as_they_were(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, out = make_checkpoint(tmp_path_factory.mktemp("model")), str(tmp_path_factory.mktemp("out"))
    for said in ranks.run(step_by_hand_and_fail, folder, out):
        assert said == [True, True, "KeyError", True, [True, True], True]

"""Signals end a run at a step's end on all ranks at once; numbers that are none end it before they do harm."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_qlora_fsdp.errors import NonFiniteError
from hf_qlora_fsdp.resuming.watch import SIGNALS, GradientWatch, PreemptionCallback


def run_steps(rank: int, number: int, signalled_rank: int) -> list:
    before = [signal.getsignal(name) for name in SIGNALS]
    callback, control, state = PreemptionCallback(), TrainerControl(), TrainerState(global_step=1)
    callback.on_train_begin(None, state, control)
    callback.on_step_end(None, state, control)
    untouched = (control.should_save, control.should_training_stop)
    if rank == signalled_rank:
        os.kill(os.getpid(), number)
    callback.on_step_end(None, state, control)
    callback.on_train_end(None, state, control)
    restored = [signal.getsignal(name) for name in SIGNALS] == before
    return [untouched, (control.should_save, control.should_training_stop), callback.preempted, restored]


def leave_out_evaluations(rank: int) -> list:
    callback, control, state = PreemptionCallback(), TrainerControl(), TrainerState(global_step=1)
    callback.received = int(signal.SIGTERM)
    control.should_evaluate = True  # as upstream's callback, which comes first, has said
    callback.on_step_end(None, state, control)
    at_step = (control.should_evaluate, control.should_save)
    control.should_evaluate = control.should_save = True
    callback.on_epoch_end(None, state, control)
    return [at_step, (control.should_evaluate, control.should_save), control.should_training_stop]


def test_nothing_delays_the_checkpoint_of_a_run_that_must_stop(ranks):
    assert ranks.run(leave_out_evaluations)[0] == [(False, True), (False, False), True]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_one_signalled_rank_stops_all_after_the_same_step(ranks, number, signalled_rank):
    for result in ranks.run(run_steps, int(number), signalled_rank):
        assert result == [(False, False), (True, True), True, True]


def examine(rank: int, action: str, norm: float, losses: list[float], scale: float | None = None) -> str:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    watch = GradientWatch(action)
    for loss in (losses[rank], 1.0):  # the last of the step is as good as any
        watch.observe(torch.tensor(loss))
    try:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        watch.examine(model, torch.tensor(norm), 7, lambda: "out/checkpoint-5", scaler)
    except NonFiniteError as error:
        return str(error)
    return f"{watch.num_skipped} skipped, gradient {'there' if model.weight.grad is not None else 'gone'}"


def test_finite_gradients_are_left_alone(ranks):
    assert ranks.run(examine, "stop", 1e30, [1.0, 2.0]) == ["0 skipped, gradient there"] * 2


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_the_run_stops_and_names_step_rank_and_checkpoint(ranks, norm):
    for said in ranks.run(examine, "stop", norm, [1.0, float("nan")]):
        assert f"is {norm} at step 7" in said
        assert "loss of rank 1 is nan" in said and "out/checkpoint-5" in said and 'on_nonfinite="skip"' in said
    for said in ranks.run(examine, "stop", norm, [1.0, 2.0]):
        assert "every loss is finite" in said


def test_a_step_can_be_skipped_instead(ranks):
    assert ranks.run(examine, "skip", float("nan"), [1.0, 2.0]) == ["1 skipped, gradient gone"] * 2


def test_overflowing_gradients_are_left_to_the_loss_scaler(ranks):
    assert ranks.run(examine, "stop", float("inf"), [1.0, 2.0], 4.0) == ["0 skipped, gradient there"] * 2
    for said in ranks.run(examine, "stop", float("inf"), [1.0, float("nan")], 4.0):
        assert "loss of rank 1 is nan" in said, "no scale mends that"
    for said in ranks.run(examine, "stop", float("inf"), [1.0, 2.0], 1.0):
        assert "every loss is finite, and the loss scale has fallen to 1.0" in said
    assert ranks.run(examine, "skip", float("nan"), [1.0, float("nan")], 4.0) == ["1 skipped, gradient there"] * 2

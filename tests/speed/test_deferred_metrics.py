"""What is logged is what TRL would have logged, and nothing waits for the device between forward and backward.

Two ranks train on rows of different lengths, two of which have no token to predict, in micro-batches of which one is
filled up with a row that does not count. The reference is the same run with TRL's own `gather_for_metrics`.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora_fsdp.speed.deferred_metrics import DeferredMetrics, LateNumber
from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}


def draw_rows(num_rows: int) -> Dataset:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(num_rows):
        length = 6 + 3 * (index % 5)
        ids = torch.randint(5, 261, (length,), generator=generator).tolist()
        # Of the second micro-batch, neither rank's row has anything to predict: nothing comes before the first token.
        counts = [i == 0 if index in (2, 3) else i > 2 for i in range(length)]
        rows.append({"input_ids": ids, "labels": [token if c else -100 for token, c in zip(ids, counts, strict=True)]})
    return Dataset.from_list(rows)


class Watch(TorchDispatchMode):
    """Names what is read from the device, and what ranks exchange, once it is told that the forward is over."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on, self.seen = False, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if self.is_on and ("_local_scalar_dense" in name or name.startswith("c10d")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def train(rank: int, folder: str, out: str, changes: dict[str, Any], deferred: bool) -> dict[str, Any]:
    from transformers import TrainerCallback

    tokens, types, seen = [], set(), []

    class Witness(TrainerCallback):
        """Looks at what TRL counts, wherever a callback can."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            types.update(type(value) for values in trainer._metrics["train"].values() for value in values)
            tokens.append(trainer._total_train_tokens)

        on_pre_optimizer_step = on_log = on_save = on_evaluate = on_step_end

    changes = {
        "folder": out,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "train_sampling_strategy": "sequential",
        **changes,
    }
    with pytest.MonkeyPatch.context() as patch:
        if not deferred:
            patch.setattr(DeferredMetrics, "deferring", contextlib.nullcontext)
        data = {"eval_dataset": draw_rows(5), "callbacks": [Witness()]}
        trainer = training.ours(folder, draw_rows(11), changes, **data)
        compute = trainer.compute_loss

        def watch(*args: Any, **kwargs: Any) -> Any:
            mode = Watch()
            hook = trainer.model.register_forward_hook(lambda *_: setattr(mode, "is_on", trainer.model.training))
            with mode:
                result = compute(*args, **kwargs)
            hook.remove()
            seen.extend(mode.seen)
            return result

        trainer.compute_loss = watch
        run = training.run(trainer)
    return {"run": run, "tokens": tokens, "types": types, "seen": seen, "tape": len(trainer.deferred_metrics.tape)}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_what_is_logged_is_what_trl_logs(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, model_type: str
) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
    changes: dict[str, Any] = {}
    if model_type == "mixtral":
        changes |= {"max_steps": 2, "logging_steps": 1, "eval_strategy": "no", "router_aux_loss_coef": 0.01}
    for ours, theirs in zip(
        ranks.run(train, folder, str(tmp_path_factory.mktemp("out")), changes, True),
        ranks.run(train, folder, str(tmp_path_factory.mktemp("out")), changes, False),
        strict=True,
    ):
        assert len(ours["run"].log) == len(theirs["run"].log) > 2
        for mine, reference in zip(ours["run"].log, theirs["run"].log, strict=True):
            assert {**mine, **dict.fromkeys(TIMES)} == {**reference, **dict.fromkeys(TIMES)}
        logged = ours["run"].log[0]
        assert logged["entropy"] > 0 and ("aux_loss" in logged) == (model_type == "mixtral")
        assert ours["tokens"] == theirs["tokens"] and {type(number) for number in ours["tokens"]} == {int}
        assert ours["types"] <= {int, float} and not ours["tape"]
        assert ours["seen"] == [] and len(theirs["seen"]) > 8 * changes.get("max_steps", 6)


def step_by_hand(rank: int, folder: str, out: str) -> set[str]:
    trainer = training.ours(folder, draw_rows(4), {"folder": out})
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    numbers = [*(values[0] for values in trainer._metrics["train"].values()), trainer._total_train_tokens]
    return {type(number).__name__ for number in numbers}


def test_nothing_is_put_off_in_steps_that_a_script_takes(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    for kinds in ranks.run(step_by_hand, folder, str(tmp_path_factory.mktemp("out"))):
        assert kinds == {"int", "float"}


class Alone:
    """An accelerator of one rank, whose device is the CPU; it counts what is gathered."""

    device = torch.device("cpu")
    gradient_state = SimpleNamespace(end_of_dataloader=False, remainder=-1)
    num_gathers = 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_gathers += 1
        return tensor[None] if tensor.ndim == 0 else tensor

    gather_for_metrics = gather


def make_metrics() -> tuple[DeferredMetrics, Any]:
    accelerator = Alone()
    trainer = SimpleNamespace(accelerator=accelerator, _metrics={"train": {"kept": [0.5]}}, _total_train_tokens=0)
    return DeferredMetrics(trainer), accelerator


USES: dict[str, Any] = {
    "float": lambda x: float(x) == 3.0,
    "bool": lambda x: bool(x.item()) is True,
    "format": lambda x: f"{x.item():.1f}" == "3.0",
    "round": lambda x: round(x.item() / 2, 1) == 1.5,
    "another comparison": lambda x: x < 4 and not x > 3 and x == 3 and x != 4 and x >= 2,
    "reflected": lambda x: 4 - x == 1 and 6 / x == 2 and 2 * x == 6,
    "a tensor's method": lambda x: x.float().dtype == torch.float32,
    "an attribute": lambda x: x.dtype == torch.int64 and x.shape == (1,),
    "a function of torch": lambda x: torch.cat([x, torch.ones(1)]).tolist() == [3.0, 1.0],
    "after a tensor": lambda x: (torch.ones(1) + x).tolist() == [4.0],
    "before a tensor": lambda x: (x + torch.ones(1)).tolist() == [4.0],
    "indexing": lambda x: x[0].item() == 3 and len(x) == 1 and list(x) == [3],
}


@pytest.mark.parametrize("use", USES)
def test_what_nobody_foresaw_is_answered_at_once(use: str) -> None:
    metrics, accelerator = make_metrics()
    with metrics.deferring():
        late = accelerator.gather_for_metrics(torch.tensor(3))
    assert isinstance(late, LateNumber) and not accelerator.num_gathers and "not known" in repr(late)
    assert USES[use](late) and accelerator.num_gathers == 1


def test_only_numbers_are_put_off_and_only_for_a_while() -> None:
    metrics, accelerator = make_metrics()
    with pytest.raises(KeyError), metrics.deferring():
        assert torch.equal(accelerator.gather_for_metrics(torch.ones(2)), torch.ones(2))
        metrics.trainer._metrics["train"]["kept"].append(accelerator.gather_for_metrics(torch.tensor(3)).sum().item())
        raise KeyError
    assert isinstance(accelerator.gather_for_metrics(torch.tensor(3)), torch.Tensor)
    metrics.settle()
    assert metrics.trainer._metrics["train"]["kept"] == [0.5, 3]

"""While training, collections pass over what was there before; afterwards, however it ends, they do not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from hf_qlora_fsdp.speed.frozen_objects import frozen_objects
from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_if_it_came_later_or_once_all_is_over() -> None:
    early = Cycle()
    seen = weakref.ref(early)
    with pytest.raises(KeyError), frozen_objects():
        del early
        late = weakref.ref(Cycle())
        gc.collect()
        assert late() is None and seen() is not None
        raise KeyError
    gc.collect()
    assert seen() is None


def count_frozen(rank: int, folder: str, out: str) -> list[int]:
    from transformers import TrainerCallback

    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts.append(gc.get_freeze_count())
            if len(counts) == 3:
                raise KeyError("of the second training")

    changes = {"folder": out, "max_steps": 1}
    trainer = training.ours(folder, training.equal_rows(2), changes, callbacks=[Count()])
    trainer.train()
    counts.append(gc.get_freeze_count())
    assert training.refusal(trainer.train)[0] == "KeyError"
    return [*counts, gc.get_freeze_count()]


def test_training_freezes_what_was_there(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    for first, between, second, after in ranks.run(count_frozen, folder, str(tmp_path_factory.mktemp("out"))):
        assert min(first, second) > 100_000 and between == after == 0

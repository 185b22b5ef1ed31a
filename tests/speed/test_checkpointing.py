"""Whatever number of layers is computed twice, and wherever memory runs out on the way: the same bits.

Two ranks train a model of four layers, with dropout in its adapter so that random numbers matter, and with two
micro-batches a step. Memory runs out as it does on a card: `torch.OutOfMemoryError` leaves a layer's forward, or the
autograd engine in the middle of a backward, when gradients of later layers are reduced already.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_qlora_fsdp.speed.checkpointing import count_kept, count_saved_bytes
from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

NUM_LAYERS = 4
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def train(rank: int, folder: str, out: str, runs: dict[str, dict[str, Any]]) -> dict[str, training.Run]:
    """Train once a run. Of a run: `layers` are computed twice; memory runs out in `place` of `layer` in `call`."""
    from hf_qlora_fsdp.anatomy import decoder_layers
    from hf_qlora_fsdp.sharding import base_model

    done = {}
    for name, run in runs.items():
        changes = {
            "folder": out,
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "checkpoint_layers": run["layers"],
        }
        peft = {"lora_dropout": 0.1}
        with training.listening() as said:
            trainer = training.ours(folder, training.equal_rows(12), changes, peft)
            layers = list(decoder_layers(base_model(trainer.model)).values())
            if "place" in run:
                RunsOut(layers[run["layer"]], run["place"], run["call"], run.get("always", False))
            try:
                done[name] = training.run(trainer)
            except torch.OutOfMemoryError as error:
                done[name] = training.Run()
                done[name].extra["error"] = str(error)
            done[name].extra |= {
                "said": [line for line in said if "computed twice" in line],
                "recomputed": [layer.gradient_checkpointing for layer in layers],
                "tokens": trainer._total_train_tokens,
            }
    return done


class RunsOut:
    """Raises once, in the forward or the backward of a layer, as soon as that layer keeps its activations."""

    def __init__(self, layer: Any, place: str, call: int, always: bool) -> None:
        self.layer, self.place, self.call, self.always, self.num_calls = layer, place, call, always, 0
        layer.self_attn.register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if self.layer.gradient_checkpointing and not self.always:
            return
        self.num_calls += 1
        if self.num_calls == self.call or self.always:
            if self.place == "forward":
                raise torch.OutOfMemoryError(MESSAGE)
            output[0].register_hook(self.raise_in_backward)

    def raise_in_backward(self, grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(MESSAGE)


RUNS: dict[str, dict[str, Any]] = {
    "all": {"layers": None},
    "one": {"layers": 1},
    "auto": {"layers": "auto"},
    "forward": {"layers": 0, "place": "forward", "layer": 2, "call": 3},
    "backward": {"layers": "1", "place": "backward", "layer": 2, "call": 4},
    "nothing left": {"layers": 4, "place": "forward", "layer": 1, "call": 1, "always": True},
}


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, training.Run]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)
    return ranks.run(train, folder, str(tmp_path_factory.mktemp("out")), RUNS)


@pytest.mark.parametrize("name", ["one", "auto", "forward", "backward"])
def test_no_bit_depends_on_it(trained: list[dict[str, training.Run]], name: str) -> None:
    for runs in trained:
        reference, run = runs["all"], runs[name]
        assert run.losses == reference.losses and len(run.losses) == 3
        assert run.grad_norms == reference.grad_norms
        assert all(torch.equal(value, reference.adapter[key]) for key, value in run.adapter.items())
        for theirs, ours in zip(reference.log, run.log, strict=True):  # entropy, accuracy and tokens are counted once
            for key in theirs.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
                assert ours[key] == theirs[key], key
        assert run.extra["tokens"] == reference.extra["tokens"]


@pytest.mark.parametrize(
    ("name", "recomputed", "num_lines"), [("all", 4, 0), ("one", 1, 0), ("auto", 0, 1), ("forward", 1, 1)]
)
def test_so_many_layers_are_computed_twice(
    trained: list[dict[str, training.Run]], name: str, recomputed: int, num_lines: int
) -> None:
    """The first ones. A tiny model fits into the host's memory whole; of four layers that kept all, three go on to."""
    for rank, runs in enumerate(trained):
        extra = runs[name].extra
        assert extra["recomputed"] == [index < recomputed for index in range(NUM_LAYERS)]
        assert len(extra["said"]) == (num_lines if rank == 0 else 0)


def test_what_is_done_about_a_lack_of_memory_is_said(trained: list[dict[str, training.Run]]) -> None:
    (line,) = trained[0]["backward"].extra["said"]
    assert line.startswith("Out of memory with 1 of 4 decoder layers computed twice: from now on it is 2") and (
        line.endswith(MESSAGE)
    )


def test_the_error_is_raised_when_nothing_is_left_to_give_up(trained: list[dict[str, training.Run]]) -> None:
    for runs in trained:
        assert runs["nothing left"].extra["error"].startswith(f"{MESSAGE}. 4 of 4 decoder layers")


def test_as_many_layers_keep_their_activations_as_there_is_room_for() -> None:
    assert [count_kept(32, room, 10) for room in (-5, 0, 9, 10, 319, 320, 10**9)] == [0, 0, 0, 1, 31, 32, 32]


def test_bytes_that_a_layer_saves_are_those_that_stay_allocated() -> None:
    """Of a layer of which it is known: an activation once, though two operations save it; no weight, no input."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = (x @ self.weight).exp()  # exp saves its result
            return hidden * hidden.detach().add(1)  # saves both factors, of which one is new

    layer, x = Layer(), torch.randn(5, 8, requires_grad=True)
    with count_saved_bytes(layer) as storages:
        layer(x).sum().backward()
    assert sum(storages.values()) == 2 * 5 * 8 * 4

"""Whatever number of layers is computed twice, and wherever memory runs out on the way: the same bits.

Two ranks train a model of four layers, with dropout in its adapter so that random numbers matter, and with two
micro-batches a step, of which one is longer than the others, on one rank. Memory runs out as it does on a card:
`torch.OutOfMemoryError` leaves a layer's forward, or the autograd engine in the middle of a backward, when gradients of
later layers are reduced already.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_qlora_fsdp.sharding import base_model
from hf_qlora_fsdp.speed.activation_room import Room, count_kept, count_saved_bytes, scale
from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

NUM_LAYERS = 4
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def train(rank: int, folder: str, out: str, runs: dict[str, dict[str, Any]]) -> dict[str, training.Run]:
    """Train once a run. Of a run: `layers` are computed twice; memory runs out in `place` of `layer` in `call`.

    Where `room` is given, there is room for what so many layers save, and the first step took what one saves.
    """
    from hf_qlora_fsdp.anatomy import decoder_layers
    from hf_qlora_fsdp.speed import checkpointing

    done = {}
    for name, run in runs.items():
        changes = {
            "folder": out,
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "checkpoint_layers": run["layers"],
            "train_sampling_strategy": "sequential",
            **run.get("changes", {}),
        }
        peft = {"lora_dropout": run.get("dropout", 0.1)}
        with training.listening() as said, pytest.MonkeyPatch.context() as patch:
            if "room" in run:
                saved_bytes = done["auto"].extra["saved_bytes"]
                room = Room((run["room"] + 1) * saved_bytes, saved_bytes)
                patch.setattr(checkpointing, "find_room", lambda device, room=room: room)
            trainer = training.ours(folder, draw_rows(), changes, peft)
            layers = list(decoder_layers(base_model(trainer.model)).values())
            numbers: list[int] = []
            gathered = count_gathers(patch)
            base_model(trainer.model).model.register_forward_pre_hook(
                lambda *_, layers=layers, numbers=numbers: numbers.append(sum(x.gradient_checkpointing for x in layers))
            )
            if "at the loss" in run:
                run_out_around_the_loss(trainer, rank, run["at the loss"])
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
                "numbers": numbers,
                "gathered": len(gathered),
                "keeps_random_states": layers[0]._gradient_checkpointing_func.keywords.get("preserve_rng_state", True),
                "saved_bytes": trainer.checkpointing.saved_bytes if trainer.checkpointing else None,
            }
    return done


def draw_rows() -> Dataset:
    """Return the rows of three steps. The second rank's first one of the last step is twice as long as the others."""
    rows = [row["input_ids"] for row in training.equal_rows(14)]
    rows[9] += rows.pop()
    rows.pop()
    return Dataset.from_dict({"input_ids": rows})


def count_gathers(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry whenever FSDP gathers a unit."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    calls: list[int] = []
    gather = _fsdp_param_group.foreach_all_gather

    def count(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return gather(*args, **named)

    patch.setattr(_fsdp_param_group, "foreach_all_gather", count)
    return calls


class RunsOut:
    """Raises once, in a layer's forward, its backward, or when it is computed again, in a given call of it.

    Calls count while the layer keeps its activations, for the last of the three while it does not.
    """

    def __init__(self, layer: Any, place: str, call: int, always: bool) -> None:
        self.layer, self.place, self.call, self.always, self.num_calls = layer, place, call, always, 0
        layer.self_attn.register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if self.layer.gradient_checkpointing != (self.place == "recompute") and not self.always:
            return
        self.num_calls += 1
        if self.num_calls == self.call or self.always:
            if self.place != "backward":
                raise torch.OutOfMemoryError(MESSAGE)
            output[0].register_hook(self.raise_in_backward)

    def raise_in_backward(self, grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(MESSAGE)


def run_out_around_the_loss(trainer: Any, rank: int, call: int) -> None:
    """Let the first rank run out after the last layer of a forward, and the other when its backward begins."""
    compute, calls = trainer.compute_loss, []

    def raise_at_the_call(*_: Any) -> None:
        if len(calls) == call:
            raise torch.OutOfMemoryError(MESSAGE)

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        loss = compute(*args, **kwargs)
        loss.register_hook(raise_at_the_call)
        return loss

    trainer.compute_loss = compute_loss
    if rank == 0:
        base_model(trainer.model).model.norm.register_forward_hook(raise_at_the_call)


RUNS: dict[str, dict[str, Any]] = {
    "all": {"layers": None},
    "one": {"layers": 1},
    "auto": {"layers": "auto"},
    "forward": {"layers": 0, "place": "forward", "layer": 2, "call": 3},
    "backward": {"layers": "1", "place": "backward", "layer": 2, "call": 4},
    # The layer's calls: forward and again of the first micro-batch, then of the second, whose gradients are added.
    "recompute": {"layers": 2, "place": "recompute", "layer": 1, "call": 4},
    # Of the second step's second micro-batch, one rank has metrics that are not gathered yet.
    "at the loss": {"layers": 0, "at the loss": 4},
    "a longer batch": {"layers": "auto", "room": NUM_LAYERS},
    "kept gathered": {"layers": None, "changes": {"reshard_after_forward": False}},
    "replicated": {"layers": 1, "changes": {"replicate_layers": "all"}},
    "replicated, some": {"layers": 0, "place": "forward", "layer": 2, "call": 3, "changes": {"replicate_layers": 3}},
    "replicated, backward": {
        "layers": "1",
        "place": "backward",
        "layer": 2,
        "call": 4,
        "changes": {"replicate_layers": "all"},
    },
    "no dropout": {"layers": None, "dropout": 0.0, "changes": {"max_steps": 1}},
    "nothing left": {"layers": 4, "place": "forward", "layer": 1, "call": 1, "always": True},
}


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, training.Run]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)
    return ranks.run(train, folder, str(tmp_path_factory.mktemp("out")), RUNS)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("all", "no dropout", "nothing left")])
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
    ("name", "recomputed", "num_lines"),
    [
        ("all", 4, 0),
        ("one", 1, 0),
        ("auto", 0, 1),
        ("forward", 1, 1),
        ("recompute", 3, 1),
        ("at the loss", 1, 1),
        ("a longer batch", 0, 1),
    ],
)
def test_so_many_layers_are_computed_twice(
    trained: list[dict[str, training.Run]], name: str, recomputed: int, num_lines: int
) -> None:
    """The first ones. A tiny model fits into the host's memory whole; of four layers that kept all, three go on to."""
    for rank, runs in enumerate(trained):
        extra = runs[name].extra
        assert extra["recomputed"] == [index < recomputed for index in range(NUM_LAYERS)]
        assert len(extra["said"]) == (num_lines if rank == 0 else 0)


def test_a_longer_batch_on_any_rank_has_more_layers_computed_twice(trained: list[dict[str, training.Run]]) -> None:
    """Twice as long, it takes twice what the first step took, and each layer saves twice as much: (5 - 2) // 2."""
    for runs in trained:
        assert runs["a longer batch"].extra["numbers"] == [4, 4, 3, 3, NUM_LAYERS - 1, 0]
        assert runs["auto"].extra["numbers"] == [4, 4, 3, 3, 0, 0]


def test_units_are_gathered_once_a_step_where_they_stay_whole_anyway(trained: list[dict[str, training.Run]]) -> None:
    """Of three steps with two micro-batches: each layer is a unit, the embedding is, and norm and head are one."""
    for runs in trained:
        num_units = NUM_LAYERS + 2
        assert runs["kept gathered"].extra["gathered"] == 3 * num_units
        # All adapters are one unit; embedding and head, which are not replicated, are gathered as ever.
        assert runs["replicated"].extra["gathered"] == 3 * (1 + 2 * 2)
        assert runs["all"].extra["gathered"] == 3 * 2 * (num_units + NUM_LAYERS)  # layers again for the backward


def test_random_states_are_kept_only_with_dropout(trained: list[dict[str, training.Run]]) -> None:
    for runs in trained:
        assert runs["all"].extra["keeps_random_states"] is True
        assert runs["no dropout"].extra["keeps_random_states"] is False and runs["no dropout"].losses


def test_room_is_counted_for_the_longest() -> None:
    assert Room(100, 30).left(20, 10) == 40 and Room(100, 30).left(5, 10) == 70
    assert scale(7, 30, 20) == 10 and scale(7, 20, 20) == 7 and scale(7, 20, 0) == 7


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

"""What a run takes of a card, moment by moment and cause by cause.

Between steps a card holds its shards, the adapter and the optimizer. On top of that memory rises and falls within a
step, and the most is reached at one of a few moments. Which one depends on the model and the batch, so each is added up
and the largest counts. With R for what is resident, U for a gathered unit (E and H for embedding and head), x for what
passes from layer to layer, and `trial` for what a layer takes while it computes (`layer_trial.py`):

    load             shards so far + one unit whole + one tensor or the unit's shards
    embedding        R + 2 E
    gathering i      R + 2 U + i x
    layer i          R +   U + i x + trial.forward
    gathering head   R + 2 H + L x
    loss             R +   H + L x + norm + one tile of logits
    loss, backward   R +   H + L x + norm + one tile + gradient in float32
    layer i, back    R + 2 U + i x + trial.backward + gradients of the layers above
    optimizer        R + all gradients

**2 U.** FSDP2 gathers into one buffer and copies out into the parameters. In the forward that buffer is freed before
the unit computes (`sharding_policy.py`). In the backward it is that of the next unit, gathered ahead. One rank gathers
nothing and copies its shards into the parameters: once, or twice where they come from the host. A head that is tied to
the embedding stays gathered with it for the whole step.

**Replicated layers** are held whole. What they gather is their adapters, which stay until their backward, and whose
gradients are reduced for some layers together (`sharding_policy.py`); how many of them are still there is not followed.

**x.** With checkpointing it is all that a layer keeps. Offloaded, the last five tensors are left on the card in the
forward, since they may still be on their way (at the loss three of these are the norm's), and the layer's own in the
backward. The first one stays in any case: it is the leaf that gradients end at.

**The loss** is TRL's, which never has all logits: tiles of 4,096 tokens by 32,768 words where the head is trained, as
many logits of fewer tokens where it is frozen (`compat/trl_head_gradient.py`).

Outside of torch's allocator lie the CUDA context, the code of kernels and NCCL's buffers, and inside of it holes.
Neither follows from anything here: both are measured (`cards.py`).

Source:
    torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py (`unshard`, `wait_for_unshard`, `_backward_prefetch`) and
    `_fsdp_state.py` (`_post_forward`, which frees the last buffer); trl/kernels/chunked_logprob.py and
    trl/trainer/utils.py (`add_fused_lm_head`); trl/models/activation_offloading.py (`max_fwd_stash_size`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from ..compat.trl_head_gradient import tokens_at_a_time
from ..sharding_policy import ADAPTERS_AT_ONCE
from .layer_trial import Trial, try_layer, try_norm
from .settings import Settings
from .weighing import ModelWeight, UnitWeight

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""`TOKEN_CHUNK_SIZE` of trl/kernels/chunked_logprob.py, `_CHUNKED_LOGPROB_CHUNK_SIZE` of trl/trainer/utils.py."""
STASH, STASH_AT_LOSS = 5, 2
"""Inputs of layers that activation offloading keeps on the card in the forward, the layer's own included."""
WORKSPACE_BYTES = {9: 32 << 20, 10: 32 << 20}
OTHER_WORKSPACE_BYTES = 8_519_680
"""cuBLAS' own, by major compute capability: aten/src/ATen/cuda/CublasHandlePool.cpp (`getChosenWorkspaceSize`)."""
NUM_WORKSPACES = 2  # the forward's thread has one, the backward's another

CAUSES = (
    "4-bit codes",
    "scales",
    "embedding, head and norms",
    "LoRA",
    "optimizer",
    "gradients",
    "gathered units",
    "dequantised weights",
    "kept activations",
    "activations of a layer",
    "loss",
    "loading",
    "workspaces",
)
_SHARDS = {"codes": CAUSES[0], "scales": CAUSES[1], "plain": CAUSES[2], "trained": CAUSES[3]}
_COMPUTING = {"activations": "activations of a layer", "gradients": "gradients"}


@dataclass(frozen=True)
class Moment:
    """A moment at which memory may be fullest.

    Args:
        name (`str`): What happens.
        parts (`tuple`): Bytes by cause, in several dicts, what torch's allocator hands out.
    """

    name: str
    parts: tuple[Mapping[str, int], ...]

    @property
    def total(self) -> int:
        return sum(sum(part.values()) for part in self.parts)

    @property
    def sizes(self) -> Counter[str]:
        """All of it by cause."""
        sizes: Counter[str] = Counter()
        for part in self.parts:
            sizes.update({_COMPUTING.get(cause, cause): size for cause, size in part.items()})
        return +sizes


def find_peaks(weight: ModelWeight, settings: Settings, compute_capability: int = 9) -> dict[str, Moment]:
    """Return the fullest moment of each phase, `"load"`, `"first step"` and `"steady"`.

    Args:
        weight (`ModelWeight`): The model.
        settings (`Settings`): The run.
        compute_capability (`int`): Major one of the card, on which the size of cuBLAS' workspace depends.
    """
    weight = settings.lay_out(weight)
    workspaces = NUM_WORKSPACES * WORKSPACE_BYTES.get(compute_capability, OTHER_WORKSPACE_BYTES)
    held = resident(weight, settings)
    held["workspaces"] = workspaces
    *others, last = _Step(weight, settings, held).moments()
    most = max(others, key=_total)
    # In the first step the optimizer has no states until all gradients are there.
    without = Counter({cause: size for cause, size in held.items() if cause != "optimizer"})
    first = Moment(most.name, (without, *most.parts[1:]))
    peaks = {"load": _load(weight, settings), "first step": (first, last), "steady": (most, last)}
    return {phase: max(moments, key=_total) for phase, moments in peaks.items()}


def _total(moment: Moment) -> int:
    return moment.total


def resident(weight: ModelWeight, settings: Settings) -> Counter[str]:
    """Return what a card holds between steps, by cause: its shards, the adapter and the optimizer's two moments."""
    sizes: Counter[str] = Counter()
    weight, offloaded = settings.lay_out(weight), settings.offloaded(weight)
    for unit in weight.units:
        sizes += _named(_resident_of(unit, settings, offloaded))
    sizes["optimizer"] = 2 * sizes["LoRA"]
    return sizes


def _resident_of(unit: UnitWeight, settings: Settings, offloaded: set[str]) -> Counter[str]:
    shards = unit.parts.shards(settings.num_ranks)
    if unit.unit.name not in offloaded:
        return shards
    return shards - unit.parts.frozen_matrices.shards(settings.num_ranks)


def _named(sizes: Counter[str]) -> Counter[str]:
    return Counter({_SHARDS[kind]: size for kind, size in sizes.items()})


class _Step:
    """One step, moment by moment.

    Args:
        weight (`ModelWeight`), settings (`Settings`): The run.
        held (`Counter[str]`): What is held all the time, the first part of each moment.
    """

    def __init__(self, weight: ModelWeight, settings: Settings, held: Counter[str]) -> None:
        self.weight, self.settings, self.held = weight, settings, held
        self.ranks, self.itemsize = settings.num_ranks, weight.param_dtype.itemsize
        again = settings.recomputed(len(weight.layers))
        self.layers = [
            (layer, _try(weight, layer.kind, settings, index < again)) for index, layer in enumerate(weight.layers)
        ]
        self.embedding, self.head = _ends(weight)
        # An embedding that is the head, too, is gathered until the step's end; adapters of replicated layers until the
        # end of their backward.
        self.tied = self.embedding.parts.gathered(self.ranks) if self.embedding and not self.head else 0
        self.replicated = settings.replicated(weight)
        adapters = sum(layer.parts.gathered(self.ranks) for layer in weight.layers if self._is_whole(layer))
        self.stays = self.tied + adapters
        self.at_once = min(ADAPTERS_AT_ONCE, len(self.replicated))
        self.offloaded = settings.offloaded(weight)
        text_config = weight.config.get_text_config()
        self.hidden, self.num_words = settings.tokens * text_config.hidden_size, text_config.vocab_size
        # Where layers keep their inputs on the card, the first of these is it.
        self.leaf = self.hidden * self.itemsize if settings.activation_offloading else 0

    def moments(self) -> Iterator[Moment]:
        """Yield the moments, the optimizer's last."""
        yield from self._forward()
        yield from self._loss()
        yield from self._backward()
        gradients = sum(_gradients(self.weight, self.ranks))
        yield self._moment("optimizer", {"gathered units": self.tied, "gradients": gradients})

    def _moment(self, name: str, *parts: Mapping[str, int]) -> Moment:
        return Moment(name, (self.held, *parts))

    def _is_whole(self, unit: UnitWeight) -> bool:
        return unit.unit.name in self.replicated

    def _gathered(self, unit: UnitWeight) -> int:
        """Return what a unit takes once it is gathered, if it does not stay."""
        return 0 if self._is_whole(unit) else unit.parts.gathered(self.ranks)

    def _copied(self, unit: UnitWeight) -> int:
        """Return what a unit takes while it is gathered: itself, and what it is copied out of."""
        copies = 2 if self.ranks > 1 or unit.unit.name in self.offloaded else 1
        return copies * self._gathered(unit)

    def _forward(self) -> Iterator[Moment]:
        if self.embedding:
            yield self._moment("embedding", {"gathered units": self._copied(self.embedding)})
        kept = 0
        for index, (layer, trial) in enumerate(self.layers):
            lower = kept + self.leaf
            if self.settings.activation_offloading:
                lower = min(kept, (STASH - 1) * trial.kept + self.leaf)
            whole = self._gathered(layer)
            for name, gathered, computing in (
                ("gathering", self._copied(layer), {}),
                ("layer", whole, trial.forward),
            ):
                sizes = {"gathered units": self.stays + gathered, "kept activations": lower}
                yield self._moment(f"{name} {index}", sizes, computing)
            kept += trial.kept

    def _loss(self) -> Iterator[Moment]:
        settings, head = self.settings, self.head
        kept = self.leaf + sum(trial.kept for _, trial in self.layers)
        if settings.activation_offloading:
            kept = self.leaf + min(kept - self.leaf, STASH_AT_LOSS * max(trial.kept for _, trial in self.layers))
        norm = try_norm(self.weight, settings)
        end = head or self.embedding
        trained_numel = end.parts.trained_numel(1) if end else 0
        whole = self.stays + (head.parts.gathered(self.ranks) if head else 0)
        gathered = self.stays + (self._copied(head) if head else 0)
        yield self._moment("gathering head", {"gathered units": gathered, "kept activations": kept})
        around = {"kept activations": kept + norm.kept}
        # The norm's output, and of it the rows that count; with a frozen head their gradient, in part in float32.
        rows = min(settings.tokens, tokens_at_a_time(self.num_words))
        made = rows * (self.num_words * self.itemsize + 4 * self.hidden // settings.tokens)
        tile = min(settings.tokens, TILE_TOKENS) * TILE_WORDS * self.itemsize
        loss = 2 * self.hidden * self.itemsize + (tile if trained_numel else made + self.hidden * self.itemsize)
        yield self._moment("loss", {"gathered units": whole, "loss": loss} | around)
        # That gradient, multiplied by the loss's; or these rows again, their gradient in float32, and that cast.
        loss = tile + self.hidden * (4 + 2 * self.itemsize) if trained_numel else 2 * self.hidden * self.itemsize
        gradients = trained_numel * (4 + self.itemsize)
        yield self._moment("loss, backward", {"gathered units": whole, "loss": loss, "gradients": gradients} | around)

    def _backward(self) -> Iterator[Moment]:
        offloading, layers = self.settings.activation_offloading, self.layers
        # An embedding that is only looked up in is not gathered again (`sharding.shard_unit`).
        is_last = self.embedding and self.head and self.embedding.parts.trained_numel(1)
        last = self.embedding if is_last else None
        below = [0 if offloading else total for total in accumulate(trial.kept for _, trial in layers)]
        reduced = previous = waiting = 0
        for index, (layer, trial) in reversed(list(enumerate(layers))):
            kept = self.leaf + (below[index - 1] if index else 0)
            ahead = layers[index - 1][0] if index else last
            gathered = self.stays + self._gathered(layer)
            gathered += self._gathered(ahead) if ahead and self.ranks > 1 else 0
            sizes = {"gathered units": gathered, "kept activations": kept, "gradients": reduced + previous + waiting}
            yield self._moment(f"layer {index}, backward", sizes, trial.backward)
            # The whole gradient in float32 stays until the next unit has its own. Of replicated layers it is that of
            # some together, whose own gradients wait for the last one's.
            trained, together = layer.parts.trained_numel(self.ranks), self.at_once if self._is_whole(layer) else 1
            previous, waiting = 4 * trained * together, self.itemsize * trained * (together - 1)
            reduced += 4 * trained // self.ranks


def _gradients(weight: ModelWeight, ranks: int) -> Iterator[int]:
    return (4 * unit.parts.trained_numel(ranks) // ranks for unit in weight.units)


def _load(weight: ModelWeight, settings: Settings) -> Iterator[Moment]:
    """Yield the moments of loading: units come in the largest first, each is whole and then cut (`loader.py`)."""
    offloaded = settings.offloaded(weight)
    held: Counter[str] = Counter()
    units = [unit for unit in weight.units if unit.unit.name]
    rest = [unit for unit in weight.units if not unit.unit.name]
    for unit in [*sorted(units, key=lambda unit: -unit.parts.final_bytes), *rest]:
        whole = unit.parts.final_bytes + 4 * unit.parts.trained_numel(1)
        shards = _resident_of(unit, settings, offloaded)
        copied = shards.total() - unit.parts.whole_bytes
        loading = {"loading": whole + max(unit.transient_bytes, copied)}
        yield Moment(f"loading {unit.unit.name}", (held, loading))
        held = held + _named(shards)


def _try(weight: ModelWeight, kind: str, settings: Settings, again: bool) -> Trial:
    return try_layer(
        weight,
        kind,
        batch=settings.batch,
        seq=settings.seq,
        gradient_checkpointing=again,
        use_liger_kernel=settings.use_liger_kernel,
        fuse=settings.fuse_lora,
    )


def _ends(weight: ModelWeight) -> tuple[UnitWeight | None, UnitWeight | None]:
    """Return the unit of the embedding, and that of the head where it is another one."""
    others = [unit for unit in weight.units if not unit.unit.is_decoder_layer and unit.unit.name]
    embedding = others[0] if others else None
    return embedding, others[-1] if len(others) > 1 else None

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

**x.** With checkpointing it is all that a layer keeps. Offloaded, the last five tensors are left on the card in the
forward, since they may still be on their way (at the loss three of these are the norm's), and the layer's own in the
backward. The first one stays in any case: it is the leaf that gradients end at.

**The loss** is TRL's, which never has all logits: tiles of 4,096 tokens by 32,768 words.

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

from ..sharding_policy import ShardingPolicy
from .layer_trial import Trial, try_layer, try_norm
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
class Settings:
    """How a run is set up, as far as memory and time depend on it. Names are those of `QLoRAFSDPConfig`.

    Args:
        num_ranks (`int`): Cards that share the weights.
        ranks_per_host (`int`): Of these, on one host.
        seq (`int`): Tokens a sequence.
        batch (`int`): Sequences that a rank takes at a time.
        gradient_accumulation_steps (`int`): Times that it does so a step.
        gradient_checkpointing (`bool`): Whether layers compute their forward again in the backward.
        checkpoint_layers (`int`, *optional*): How many of them do, the first ones; all by default.
        activation_offloading (`bool`): Whether what they keep goes to the host.
        cpu_offload (`bool`), cpu_offload_pin_memory (`bool`), cpu_offload_layers (`int`, *optional*): Which frozen
            weights lie in host memory, and in which kind of it.
        mapped (`bool`): Whether they lie in files (`cpu_offload_dir`).
        use_liger_kernel (`bool`), fuse_lora (`bool`): How layers are computed.
    """

    num_ranks: int = 1
    ranks_per_host: int = 1
    seq: int = 2048
    batch: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    checkpoint_layers: int | None = None
    activation_offloading: bool = False
    cpu_offload: bool = False
    cpu_offload_pin_memory: bool = True
    cpu_offload_layers: int | None = None
    mapped: bool = False
    use_liger_kernel: bool = False
    fuse_lora: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that a rank takes at a time."""
        return self.seq * self.batch

    @property
    def pins_memory(self) -> bool:
        return self.cpu_offload_pin_memory and not self.mapped

    def recomputed(self, num_layers: int) -> int:
        """Return how many layers compute their forward again."""
        if not self.gradient_checkpointing:
            return 0
        return num_layers if self.checkpoint_layers is None else self.checkpoint_layers

    def describe(self, num_layers: int) -> str:
        """Say in words what is done about memory."""
        words = [f"batch {self.batch}"]
        if self.gradient_accumulation_steps > 1:
            words[0] += f" x {self.gradient_accumulation_steps}"
        again = self.recomputed(num_layers)
        if again < num_layers:
            words.append(f"{again} of {num_layers} layers computed twice" if again else "nothing computed twice")
        if self.activation_offloading:
            words.append("activations offloaded")
        if self.cpu_offload:
            count = self.cpu_offload_layers
            what = "all weights" if count is None else f"{count} of {num_layers} layers"
            words.append(f"{what} offloaded{'' if self.pins_memory else ', not pinned'}")
        return ", ".join(words)

    def offloaded(self, weight: ModelWeight) -> set[str]:
        """Return the names of the offloaded units."""
        policy = ShardingPolicy(cpu_offload=self.cpu_offload, cpu_offload_layers=self.cpu_offload_layers)
        return policy.offloaded_units([unit.unit for unit in weight.units if unit.unit.name])


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
    workspaces = NUM_WORKSPACES * WORKSPACE_BYTES.get(compute_capability, OTHER_WORKSPACE_BYTES)
    held = resident(weight, settings)
    held["workspaces"] = workspaces
    *others, last = _step(weight, settings, held)
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
    offloaded = settings.offloaded(weight)
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


def _step(weight: ModelWeight, settings: Settings, held: Counter[str]) -> Iterator[Moment]:
    """Yield the moments of a step, the optimizer's last, each with what is held all the time as its first part."""
    ranks, tokens, itemsize = settings.num_ranks, settings.tokens, weight.param_dtype.itemsize
    again = settings.recomputed(len(weight.layers))
    layers = [(layer, _try(weight, layer.kind, settings, index < again)) for index, layer in enumerate(weight.layers)]
    embedding, head = _ends(weight)
    tied = head is None
    stays = (
        embedding.parts.gathered(ranks) if embedding and tied else 0
    )  # gathered from the embedding to the step's end
    offloaded = settings.offloaded(weight)

    def copies(unit: UnitWeight) -> int:
        return 2 if ranks > 1 or unit.unit.name in offloaded else 1

    hidden = tokens * weight.config.get_text_config().hidden_size
    # Where layers keep their inputs on the card, the first of these is it.
    leaf = hidden * itemsize if settings.activation_offloading else 0
    if embedding:
        yield _moment("embedding", held, {"gathered units": copies(embedding) * embedding.parts.gathered(ranks)})
    kept = 0
    for index, (layer, trial) in enumerate(layers):
        lower = min(kept, (STASH - 1) * trial.kept + leaf) if settings.activation_offloading else kept + leaf
        for name, count, computing in (("gathering", copies(layer), {}), ("layer", 1, trial.forward)):
            sizes = {"gathered units": stays + count * layer.parts.gathered(ranks), "kept activations": lower}
            yield _moment(f"{name} {index}", held, sizes, computing)
        kept += trial.kept
    if settings.activation_offloading:
        kept = min(kept, STASH_AT_LOSS * max(trial.kept for _, trial in layers))

    norm = try_norm(weight, batch=settings.batch, seq=settings.seq, use_liger_kernel=settings.use_liger_kernel)
    tile = min(tokens, TILE_TOKENS) * TILE_WORDS * itemsize
    whole = head.parts.gathered(ranks) if head else stays
    gathered = copies(head) * whole if head else whole
    yield _moment("gathering head", held, {"gathered units": gathered, "kept activations": kept + leaf})
    around = {"kept activations": kept + leaf + norm.kept}
    # The norm's output, and of it the rows that count.
    forward = {"gathered units": whole, "loss": tile + 2 * hidden * itemsize}
    yield _moment("loss", held, forward | around)
    # These rows again, their gradient in float32, and that cast to their dtype.
    end = head or embedding
    trained = end.parts.trained_numel(1) * (4 + itemsize) if end else 0  # a head that is trained whole
    backward = {"gathered units": whole, "loss": tile + hidden * (4 + 2 * itemsize), "gradients": trained}
    yield _moment("loss, backward", held, backward | around)

    # An embedding that is only looked up in is not gathered again (`sharding.shard_unit`).
    trained_end = embedding if embedding and not tied and embedding.parts.trained_numel(1) else None
    reduced = previous = 0
    below = [0 if settings.activation_offloading else total for total in accumulate(trial.kept for _, trial in layers)]
    for index, (layer, trial) in reversed(list(enumerate(layers))):
        kept = leaf + (below[index - 1] if index else 0)
        ahead = layers[index - 1][0] if index else trained_end
        gathered = stays + layer.parts.gathered(ranks) + (ahead.parts.gathered(ranks) if ahead and ranks > 1 else 0)
        sizes = {"gathered units": gathered, "kept activations": kept, "gradients": reduced + previous}
        yield _moment(f"layer {index}, backward", held, sizes, trial.backward)
        previous = 4 * layer.parts.trained_numel(
            ranks
        )  # the whole gradient in float32, until the next unit has its own
        reduced += previous // ranks
    yield _moment("optimizer", held, {"gathered units": stays, "gradients": sum(_gradients(weight, ranks))})


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
        yield _moment(f"loading {unit.unit.name}", held, {"loading": whole + max(unit.transient_bytes, shards.total())})
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


def _moment(name: str, *parts: Mapping[str, int]) -> Moment:
    return Moment(name, parts)

"""A decoder layer run on shapes alone, to see what it takes while it computes.

How much a layer allocates depends on its code: on what its norms save, which kernels are fused, what checkpointing
drops and makes again. Formulas for that are written once and wrong a month later. So the layer itself is run, forward
and backward, with the very functions that will train it, on the meta device: tensors have shapes and no memory, and a
counter below autograd notes when each of them comes and goes. That takes some hundredths of a second.

Two layers in a row are run, the same one twice, since a layer is best seen between others:

    x0 -> layer -> x1 -> layer -> x2     kept       what one layer more keeps until its backward
          (the one before)               forward    the most at a time in the second forward, less what the first keeps
    x0 <- layer <- x1 <- layer <- x2     backward   the most at a time in the second backward, likewise

What runs on cards alone is stood in for, by what it allocates (`stand_ins.py`). So are routers, whose choice needs
values: they are taken to be balanced.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ..ranks import logger
from ..speed.fused_norms import fuse_norms, unfuse_norms
from ..speed.fusion import FusedLora, fuse_lora, unfuse_lora
from .settings import Settings
from .stand_ins import FlashAttention, LigerNorm, cause_of, kernels_stood_in_for
from .weighing import ModelWeight

ALLOCATION_BYTES = 512
"""What CUDA's caching allocator rounds sizes up to (c10/cuda/CUDACachingAllocator.cpp, `kMinBlockSize`)."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Trial:
    """What a layer takes of a card beside its weights, in bytes, by cause.

    Args:
        kept (`int`): What it keeps from its forward until its backward.
        forward (`Counter[str]`): The most at a time in its forward, what it keeps included.
        backward (`Counter[str]`): The most at a time in its backward, likewise.
    """

    kept: int
    forward: Counter[str]
    backward: Counter[str]


@dataclass(frozen=True)
class NormTrial:
    """What the norm in front of the head takes.

    Args:
        forward (`int`): The most at a time, its input and output included.
        kept (`int`): What it keeps for its backward; of its input, what only the norm keeps.
    """

    forward: int
    kept: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of meta tensors as a card's allocator would, by cause."""

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, str]] = {}
        self.now = 0
        self.known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self.begin()

    def begin(self) -> None:
        """Look for a new peak from now on."""
        self.most, self.at_most = 0, Counter[str]()
        self._note()

    def relabel(self, tensor: torch.Tensor, cause: str) -> None:
        """Say what a tensor has become."""
        key = id(tensor.untyped_storage())
        if key in self.alive:
            self.alive[key] = self.alive[key][0], cause

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # "is nothing masked?", asked about an attention mask
        if func is _aten.searchsorted.Tensor and args[0].is_meta:
            return _spread_rows(args[0].numel(), args[1].numel())  # where the rows of each expert end
        if func is _aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]  # rotary frequencies that depend on positions: others have the same shape
        result = func(*args, **(kwargs or {}))
        pytree.tree_map_only(torch.Tensor, lambda tensor: self._count(tensor, cause_of(func)), result)
        return result

    def _count(self, tensor: torch.Tensor, cause: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if not tensor.is_meta or key in self.alive or key in self.known:
            return
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.alive[key] = size, cause
        self.now += size
        weakref.finalize(storage, self._free, key)
        self._note()

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def _note(self) -> None:
        if self.now > self.most:
            self.most, self.at_most = self.now, Counter[str]()
            for size, cause in self.alive.values():
                self.at_most[cause] += size


def _spread_rows(num_rows: int, num_groups: int) -> torch.Tensor:
    """Return the ends of groups of rows that are as even as can be."""
    return torch.tensor([num_rows * (group + 1) // num_groups for group in range(num_groups)], dtype=torch.int32)


def try_layer(
    weight: ModelWeight,
    kind: str,
    *,
    batch: int,
    seq: int,
    gradient_checkpointing: bool = True,
    use_liger_kernel: bool = False,
    fuse: bool = True,
) -> Trial:
    """Run a decoder layer on shapes.

    Args:
        weight (`ModelWeight`): The model.
        kind (`str`): Name of the layer in the short model.
        batch (`int`), seq (`int`): Sequences at a time, and their tokens.
        gradient_checkpointing (`bool`): Whether it drops what it computes and computes it again.
        use_liger_kernel (`bool`): Whether norms are Liger's.
        fuse (`bool`): Whether 4-bit layers and adapters are one function.
    Raises:
        ValueError: It does not run so.
    """
    key = (kind, batch, seq, gradient_checkpointing, use_liger_kernel, fuse)
    if key not in weight.trials:
        base = weight.base
        shape = batch, seq, base.config.get_text_config().hidden_size
        try:
            with _ready_to_run(weight, use_liger_kernel, fuse):
                layer = base.get_submodule(kind)
                named = _catch_arguments(base, layer, batch, seq)
                weight.trials[key] = _run_twice(layer, named, shape, gradient_checkpointing)
        except Exception as error:  # of somebody else's code, which was not written to be run so
            said = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{type(base).__name__} cannot be planned: {kind} does not run on shapes alone "
                f"({type(error).__name__}: {said}), and nothing else says what it takes while it computes. Plan for a "
                "model of text alone, or measure this one: hf-qlora-fsdp rehearse."
            ) from error
    return weight.trials[key]


def _run_twice(layer: Any, named: dict[str, Any], shape: tuple[int, int, int], checkpointing: bool) -> Trial:
    run = functools.partial(layer, **named)
    if checkpointing:
        run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    tensors = [value for value in pytree.tree_leaves(named) if isinstance(value, torch.Tensor)]
    meter = _Meter(iter([*layer.parameters(), *layer.buffers(), *tensors]))
    dtype = next(p.dtype for p in layer.parameters() if p.requires_grad or p.ndim == 1)
    trained = [p for p in layer.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: meter.relabel(p.grad, "gradients")) for p in trained]
    with FlashAttention(), meter:
        x = torch.empty(shape, dtype=dtype, device="meta").requires_grad_()
        x = _first(run(x))
        before = meter.now
        lower = before - x.untyped_storage().nbytes()  # what the first layer keeps
        meter.begin()
        x = _first(run(x))
        kept = meter.now - before
        forward = _less(meter.at_most, lower)
        edge = torch.autograd.graph.get_gradient_edge(x)
        gradient = torch.empty_like(x)
        del x
        meter.begin()
        torch.autograd.backward([edge], [gradient])
        backward = _less(meter.at_most, lower)
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return Trial(kept, forward, backward)


def _less(sizes: Counter[str], lower: int) -> Counter[str]:
    return sizes - Counter(activations=lower)


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def try_norm(weight: ModelWeight, settings: Settings) -> NormTrial:
    """Run the norm in front of the head on shapes.

    Args:
        weight (`ModelWeight`): The model.
        settings (`Settings`): The settings.
    """
    base = weight.base
    head = base.get_output_embeddings()
    names = [name for unit in weight.units if unit.unit.keep_gathered for name in unit.unit.modules]
    ends = [base.get_submodule(name) for name in names]
    norm = next((module for module in ends if module not in (head, base.get_input_embeddings())), None)
    if norm is None:
        return NormTrial(0, 0)
    shape = (settings.batch, settings.seq, base.config.get_text_config().hidden_size)
    with _ready_to_run(weight, settings.use_liger_kernel, settings.fuse_lora):
        leaf = torch.empty(shape, dtype=weight.param_dtype, device="meta").requires_grad_()
        with _Meter(iter([leaf, *norm.parameters()])) as meter:
            x = leaf.clone()
            y = norm(x)
            del x
            return NormTrial(meter.most, meter.now - y.untyped_storage().nbytes())


# -- making it run -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ready_to_run(weight: ModelWeight, liger: bool, fuse: bool) -> Iterator[None]:
    """Bring the short model into the state that it trains in: adapters gathered in the parameter dtype."""
    model, base = weight.short, weight.base
    masters = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    for parameter, data in masters.items():
        parameter.data = data.to(weight.param_dtype)
    # Buffers are real, and some routers add one to what they compute.
    layers = [base.get_submodule(kind) for kind in {unit.kind for unit in weight.layers}]
    holders = [module for layer in layers for module in layer.modules() if module._buffers]
    buffers = [(module, dict(module._buffers)) for module in holders]
    for module, own in buffers:
        module._buffers.update({name: buffer.to("meta") for name, buffer in own.items() if buffer is not None})
    model.train()
    nothing = contextlib.nullcontext()
    try:
        with kernels_stood_in_for(), fused_layers(weight) if fuse else nothing, _liger(base) if liger else nothing:
            yield
    finally:
        for module, real in buffers:
            module._buffers.update(real)
        for parameter, data in masters.items():
            parameter.data = data


@contextlib.contextmanager
def _liger(base: nn.Module) -> Iterator[None]:
    """Have Liger's norms run, unless some are fused: the trainer then leaves Liger's out (`inputs.settle_liger`)."""
    norms = [module for module in base.modules() if "RMSNorm" in type(module).__name__]
    norms = [] if any("forward" in norm.__dict__ for norm in norms) else norms
    for norm in norms:
        norm.forward = lambda x, module=norm: LigerNorm.apply(x, module.weight)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@contextlib.contextmanager
def fused_layers(weight: ModelWeight) -> Iterator[None]:
    """Have the layers of the short model run fused. What then runs unfused is said in the run itself."""
    said, logger.disabled = logger.disabled, True
    fuse_lora(weight.short)
    fuse_norms(weight.short)
    for module in weight.short.modules():  # the meta device is none that autocast knows
        if isinstance(forward := module.__dict__.get("forward"), FusedLora):
            forward.is_usual = lambda x: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        logger.disabled = said
        unfuse_lora(weight.short)
        unfuse_norms(weight.short)


def _catch_arguments(base: Any, layer: nn.Module, batch: int, seq: int) -> dict[str, Any]:
    """Return what the model passes to a layer by name: positions, rotary embeddings and the like."""
    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Caught

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    tokens = torch.empty(batch, seq, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), FlashAttention(), _Meter(iter([])), contextlib.suppress(_Caught):
            getattr(base, base.base_model_prefix)(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return caught


class _Caught(Exception):
    """What was looked for has been seen."""

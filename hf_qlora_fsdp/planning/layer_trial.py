"""A decoder layer run on shapes alone, to see what it takes while it computes.

How much a layer allocates depends on its code: on what its norms save, which kernels are fused, what checkpointing
drops and makes again. Formulas for that are written once and wrong a month later. So the layer itself is run, forward
and backward, with the very functions that will train it, on the meta device: tensors have shapes and no memory, and a
counter below autograd notes when each of them comes and goes. That takes some hundredths of a second.

Two layers in a row are run, the same one twice, since a layer is best seen between others:

    x0 -> layer -> x1 -> layer -> x2     kept       what one layer more keeps until its backward
          (the one before)               forward    the most at a time in the second forward, less what the first keeps
    x0 <- layer <- x1 <- layer <- x2     backward   the most at a time in the second backward, likewise

What runs on cards alone is stood in for, by what it allocates: flash attention (its output, one number a row and head,
and in the backward an accumulator in float32), Liger's norm, and our Triton kernels. So are routers, whose choice needs
values: they are taken to be balanced.

Source:
    Flash attention's buffers: pytorch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (`mha_fwd`,
    `mha_bwd`). Liger's norm: liger_kernel/ops/rms_norm.py, which writes the gradient of the input over the output's.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from .. import packed_linear
from ..experts import layers as experts
from ..experts.stacks import StackLayout, dequantize_pieces
from ..kernels import joined_product, silu_product, swiglu
from ..packing import ALL, PackedLayout, dequantize
from ..ranks import logger
from ..speed.fusion import FusedLora, fuse_lora, unfuse_lora
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

    cause = "activations"

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
        cause = "dequantised weights" if func.namespace == "bitsandbytes" else self.cause
        pytree.tree_map_only(torch.Tensor, lambda tensor: self._count(tensor, cause), result)
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
    with _FlashAttention(), meter:
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


def try_norm(weight: ModelWeight, *, batch: int, seq: int, use_liger_kernel: bool = False) -> NormTrial:
    """Run the norm in front of the head on shapes.

    Args:
        weight (`ModelWeight`): The model.
        batch (`int`), seq (`int`): Sequences at a time, and their tokens.
        use_liger_kernel (`bool`): Whether it is Liger's.
    """
    base = weight.base
    head = base.get_output_embeddings()
    names = [name for unit in weight.units if unit.unit.keep_gathered for name in unit.unit.modules]
    ends = [base.get_submodule(name) for name in names]
    norm = next((module for module in ends if module not in (head, base.get_input_embeddings())), None)
    if norm is None:
        return NormTrial(0, 0)
    shape = (batch, seq, base.config.get_text_config().hidden_size)
    with _ready_to_run(weight, use_liger_kernel, fuse=False):
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
    norms = [module for module in base.modules() if "RMSNorm" in type(module).__name__] if liger else []
    for parameter, data in masters.items():
        parameter.data = data.to(weight.param_dtype)
    # Buffers are real, and some routers add one to what they compute.
    layers = [base.get_submodule(kind) for kind in {unit.kind for unit in weight.layers}]
    holders = [module for layer in layers for module in layer.modules() if module._buffers]
    buffers = [(module, dict(module._buffers)) for module in holders]
    for module, own in buffers:
        module._buffers.update({name: buffer.to("meta") for name, buffer in own.items() if buffer is not None})
    for norm in norms:
        norm.forward = lambda x, module=norm: _LigerNorm.apply(x, module.weight)
    model.train()
    in_place_of = [(module, name, getattr(module, name)) for module, name, _ in _STAND_INS]
    for module, name, stand_in in _STAND_INS:
        setattr(module, name, stand_in)
    try:
        with fused_layers(weight) if fuse else contextlib.nullcontext():
            yield
    finally:
        for module, name, own in in_place_of:
            setattr(module, name, own)
        for module, real in buffers:
            module._buffers.update(real)
        for norm in norms:
            del norm.forward
        for parameter, data in masters.items():
            parameter.data = data


@contextlib.contextmanager
def fused_layers(weight: ModelWeight) -> Iterator[None]:
    """Have the layers of the short model run fused. What then runs unfused is said in the run itself."""
    said, logger.disabled = logger.disabled, True
    fuse_lora(weight.short)
    for module in weight.short.modules():  # the meta device is none that autocast knows
        if isinstance(forward := module.__dict__.get("forward"), FusedLora):
            forward.is_usual = lambda x: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        logger.disabled = said
        unfuse_lora(weight.short)


def _dequantize_pieces(
    stack: torch.Tensor, start: int, stop: int, layout: StackLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Make what `experts/stacks.dequantize_pieces` does, and on the meta device nothing beside it."""
    if not stack.is_meta:
        return dequantize_pieces(stack, start, stop, layout, dtype)
    piece = layout.piece
    shape = (stop - start) * piece.shape[0], piece.shape[1]
    return _dequantize_on_meta(stack, shape, piece, dtype).view(stop - start, *piece.shape)


def _dequantize(
    packed: torch.Tensor,
    layout: PackedLayout,
    dtype: torch.dtype,
    rows: slice = ALL,
    columns: slice = ALL,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make what `packing.dequantize` does, and on the meta device nothing beside it."""
    if not packed.is_meta:
        return dequantize(packed, layout, dtype, rows, columns, out)
    if out is not None and (out.is_contiguous() or layout.has_whole_rows):
        return out
    weight = _dequantize_on_meta(packed, layout.part(rows, columns).shape, layout, dtype)
    return weight if out is None else out  # into which it would be copied


def _dequantize_on_meta(
    packed: torch.Tensor, shape: tuple[int, int], layout: PackedLayout, dtype: torch.dtype
) -> torch.Tensor:
    raw = packed.detach().view(-1)
    return torch.ops.bitsandbytes.dequantize_4bit(
        raw.view(torch.uint8), raw.view(torch.float32), layout.blocksize, layout.quant_type, shape, dtype
    )


def _new_weight(like: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Make room for weights, and have it counted as theirs."""
    _Meter.cause = "dequantised weights"
    try:
        return like.new_empty(num_rows, num_columns)
    finally:
        _Meter.cause = "activations"


_STAND_INS: list[tuple[Any, str, Callable[..., Any]]] = [
    (swiglu, "silu_product", lambda g, u: g.new_empty(g.shape)),
    (swiglu, "write_gradients", lambda *_, **__: None),
    (silu_product, "silu_product", lambda g, u: g.new_empty(g.shape)),
    (silu_product, "write_gradients", lambda *_: None),
    (experts, "dequantize_pieces", _dequantize_pieces),
    (packed_linear, "dequantize", _dequantize),
    (joined_product, "new_weight", _new_weight),
]
"""In place of Triton kernels, which take no memory but for what they return; and what says what it is."""


def _catch_arguments(base: Any, layer: nn.Module, batch: int, seq: int) -> dict[str, Any]:
    """Return what the model passes to a layer by name: positions, rotary embeddings and the like."""
    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Caught

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    tokens = torch.empty(batch, seq, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _FlashAttention(), _Meter(iter([])), contextlib.suppress(_Caught):
            getattr(base, base.base_model_prefix)(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return caught


class _Caught(Exception):
    """What was looked for has been seen."""


class _FlashAttention(TorchFunctionMode):
    """Has flash attention's buffers allocated where attention is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, _, _ = ctx.saved_tensors
        groups = q.shape[1] // k.shape[1]
        accumulator = q.new_empty(q.shape, dtype=torch.float32)
        # Where heads share keys and values, each gets gradients of its own, which are summed then.
        whole = [part.new_empty(part.shape[0], q.shape[1], *part.shape[2:]) for part in (k, v) if groups > 1]
        grads = [torch.empty_like(part) for part in (q, k, v)]
        del accumulator, whole
        return tuple(grads)


class _LigerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None

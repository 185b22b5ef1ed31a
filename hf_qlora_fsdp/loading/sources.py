"""Where the weights of a model come from, one piece at a time.

The loader asks three things of a source: what pieces there are, how large each one is, and to make one in its final
form on the device. A piece is what one rank makes at once: the parameters that come out of the same stored bytes.
Whether they are read from a checkpoint and quantised, read from a cache in 4 bits, or drawn at random is the source's
affair; what is assembled, exchanged and sharded is the same (`loader.py`).

Before the first piece is made, a source is told which ones this rank will make, in their order (`Source.stream`). One
that reads files then reads ahead while others are being quantised, in no more host memory than its largest piece takes
(the T of `loader.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..experts.layers import Experts4bit
from ..packed_linear import PackedLinear4bit
from ..packing import PackedLayout, dequantize, pack, quantize
from .expert_recipes import bytes_at_a_time, check_stack, make_stack, reading_order, transient_bytes
from .recipes import Recipe, plan_recipes, stacked_experts
from .weights import Weights


class Slot(NamedTuple):
    """The place that a tensor fills: the empty parameter or buffer, its module, and its name there."""

    tensor: torch.Tensor
    module: nn.Module
    leaf: str

    @property
    def is_packed(self) -> bool:
        """Whether it is the packed weight of a 4-bit layer."""
        return isinstance(self.module, PackedLinear4bit) and self.leaf == "weight"


Slots = dict[str, Slot]
"""Slots by the name that the parameter has in the model without adapters."""


@dataclass(frozen=True)
class Piece:
    """Some parameters, and how to make them.

    Args:
        targets (`tuple[str, ...]`): Parameters (or buffers) of the model that come out.
        num_bytes (`int`): What is read for them.
        transient_bytes (`int`): What is in memory while they are made, beside themselves in their final form.
        make (`Callable`): Makes them: slots and device in, tensors in their final form out, by target.
        reads (`tuple[str, ...]`): Stored tensors that are read for them.
    """

    targets: tuple[str, ...]
    num_bytes: int
    transient_bytes: int
    make: Callable[[Slots, torch.device], dict[str, torch.Tensor]]
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """All pieces of a model.

    Args:
        pieces (`list[Piece]`): Every parameter is a target of one of them.
        count_bytes_read (`Callable`): Returns what this rank has read so far.
        stream (`Callable`): Is given the pieces that this rank will make, in their order, and returns a context to make
            them in.
        identify (`Callable`, *optional*): Says, ready for JSON, what beside the shapes decides the values of all
            pieces. `None` where nothing is gained by keeping them (`shard_cache.py`).
        revision (`str`, *optional*): The commit on the Hub, to be told to people.
    """

    pieces: list[Piece]
    count_bytes_read: Callable[[], int]
    stream: Callable[[list[Piece]], AbstractContextManager[None]] = lambda pieces: nullcontext()
    identify: Callable[[], dict[str, Any]] | None = None
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def plan_checkpoint(
    model: PreTrainedModel, weights: Weights, param_dtype: torch.dtype, key_mapping: dict[str, str] | None = None
) -> Source:
    """Work out how a checkpoint becomes a model: read, renamed as transformers does it, quantised.

    Args:
        model (`PreTrainedModel`): The model, on the meta device, its 4-bit layers in place.
        weights (`Weights`): The checkpoint.
        param_dtype (`torch.dtype`): Dtype in which weights are quantised.
        key_mapping (`dict[str, str]`, *optional*): Renamings of the caller's own, as in `from_pretrained`.
    Raises:
        ValueError: A tensor is missing, unexpected, or has a shape that the config does not describe.
    """
    recipes = plan_recipes(model, weights, key_mapping)
    as_stored = any(recipe.quant_state or recipe.quant_states for recipe in recipes)
    pieces, budget = [], 0
    for recipe in recipes:
        experts, leaf = stacked_experts(model, recipe.targets[0]), recipe.targets[0].rpartition(".")[2]
        num_bytes, make = recipe.num_bytes(weights), partial(_make, recipe, weights)
        if experts is not None:
            check_stack(recipe, weights, experts, leaf)
            transient = transient_bytes(recipe, weights, experts, leaf)
            reads = reading_order(recipe, experts.num_experts)
            budget = max(budget, bytes_at_a_time(recipe, weights, experts.num_experts))
        else:
            transient, reads = recipe.transient_bytes(weights, param_dtype), tuple(recipe.stored_names)
            budget = max(budget, num_bytes)
        pieces.append(Piece(tuple(recipe.targets), num_bytes, transient, make, reads))
    return Source(
        pieces,
        lambda: weights.bytes_read,
        lambda mine: weights.reading_ahead([name for piece in mine for name in piece.reads], budget),
        None if as_stored else partial(_identify, recipes, weights, model),
        weights.revision,
    )


def _identify(recipes: list[Recipe], weights: Weights, model: PreTrainedModel) -> dict[str, Any]:
    """Say what is read: these files, and where tensors are converted, by a config that conversions may consult."""
    config: dict[str, Any] = {}
    if any(recipe.converter for recipe in recipes):
        config = model.config.to_dict()
        for name in ("_name_or_path", "quantization_config"):  # another place, and what the slots say already
            config.pop(name, None)
    return {"files": weights.identify(), "config": config}


def _make(recipe: Recipe, weights: Weights, slots: Slots, device: torch.device) -> dict[str, torch.Tensor]:
    made = _quantize_stored(recipe, weights, slots, device)
    weights.release(recipe.stored_names)  # only now: as long as it was needed, it counted
    return made


def _quantize_stored(recipe: Recipe, weights: Weights, slots: Slots, device: torch.device) -> dict[str, torch.Tensor]:
    """Read one recipe's tensors and bring them into their final form on the device."""
    made = {}
    for target, (empty, module, leaf) in slots.items():
        if isinstance(module, Experts4bit) and leaf in module.layouts:
            return {target: make_stack(recipe, weights, module, leaf, empty.dtype, device)}
    for target, (tensor, scales) in recipe.realize(weights.read).items():
        slot = slots[target]
        if scales and slot.is_packed:
            made[target] = _take_over(tensor, scales, slot, device)
        elif scales:
            made[target] = _dequantize(tensor, scales, slot, device)
        else:
            made[target] = finish(tensor, slot, device)
    return made


def finish(tensor: torch.Tensor, slot: Slot, device: torch.device) -> torch.Tensor:
    """Bring a tensor into its final form: quantised and packed if its layer is in 4 bits, else in the slot's dtype.

    Args:
        tensor (`torch.Tensor`): As stored, in 16 or 32 bits.
        slot (`Slot`): What it will fill.
        device (`torch.device`): Where it is quantised, and where the result lies.
    """
    module = slot.module
    if not slot.is_packed:
        return tensor.to(device, slot.tensor.dtype).contiguous()
    assert isinstance(module, PackedLinear4bit)
    weight = tensor.to(device, module.compute_dtype)
    weight = weight.t() if module.source_cls is Conv1D else weight
    return quantize(weight, module.layout, slot.tensor.dtype)


def _dequantize(codes: torch.Tensor, scales: dict[str, torch.Tensor], slot: Slot, device: torch.device) -> torch.Tensor:
    """Bring a matrix that was stored quantised into 16 bits, as one of a module that is no linear layer any more."""
    num_rows, num_columns = slot.tensor.shape
    state = QuantState.from_dict(scales, device=device)
    layout = PackedLayout((num_rows, num_columns), state.quant_type, state.nested, state.blocksize)
    return dequantize(pack(codes.to(device), state, layout, torch.uint8), layout, slot.tensor.dtype)


def _take_over(codes: torch.Tensor, scales: dict[str, torch.Tensor], slot: Slot, device: torch.device) -> torch.Tensor:
    """Pack a weight that was stored quantised, byte for byte."""
    assert isinstance(slot.module, PackedLinear4bit)
    state, layout = QuantState.from_dict(scales, device=device), slot.module.layout
    if (state.quant_type, state.nested, state.blocksize) != (layout.quant_type, layout.double_quant, layout.blocksize):
        raise ValueError(
            f"A stored weight is {state.quant_type}, double_quant={state.nested}, blocksize={state.blocksize}, while "
            f"config.json says {layout}. Weights and config do not belong together; download both from one revision."
        )
    return pack(codes.to(device), state, layout, slot.tensor.dtype)

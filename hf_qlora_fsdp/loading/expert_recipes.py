"""From the experts of a checkpoint to their stack, one expert at a time.

Checkpoints hold experts in two forms: each matrix for itself, as models had them (`experts.0.w1.weight`, ...), or all
of a projection in one tensor, as transformers 5 has them. Upstream makes one of the other by stacking whole layers: the
experts of a Mixtral-8x7B layer are 2.6 GiB in 16 bits. What it does to all of them it can do to one, so its own
conversion is applied here to the tensors of one expert after the other, and its result is packed at once. The other way
round, a merge asks which part of a stack each stored tensor is (`find_parts`).

Experts that were quantised each for itself, by bitsandbytes in the days of the old form, keep their bytes. A projection
that was quantised as one tensor is refused: its experts share an offset and second-level scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from bitsandbytes.functional import QuantState
from transformers.core_model_loading import Concatenate, MergeModulelist

from ..experts.layers import Experts4bit
from ..experts.stacks import insert_piece
from ..lora_math import Part
from ..packing import pack
from .recipes import Recipe, stored_kind
from .weights import Weights


def reading_order(recipe: Recipe, num_experts: int) -> tuple[str, ...]:
    """Return the stored tensors in the order in which they are read whole, expert by expert."""
    if recipe.converter is None:
        return ()  # one tensor, which is read in slices
    if _is_intertwined(recipe, num_experts):
        return tuple(recipe.stored_names)
    names = [name for expert in zip(*recipe.sources.values(), strict=True) for name in expert]
    return tuple(part for name in names for part in (*recipe.quant_states.get(name, {}).values(), name))


def bytes_at_a_time(recipe: Recipe, weights: Weights, num_experts: int) -> int:
    """Return what is read before any of it is released: one expert, unless they come out of a conversion together."""
    return recipe.num_bytes(weights) // (1 if _is_intertwined(recipe, num_experts) else num_experts)


def transient_bytes(recipe: Recipe, weights: Weights, experts: Experts4bit, leaf: str) -> int:
    """Return what is in memory while a stack is made, beside itself: one expert as stored, and twice as it is packed.

    Args:
        recipe (`Recipe`): The stack's.
        weights (`Weights`): The checkpoint.
        experts (`Experts4bit`): The module it belongs to.
        leaf (`str`): Which projection.
    """
    num_experts, rows, columns = experts.shapes[leaf]
    return bytes_at_a_time(recipe, weights, num_experts) + 2 * rows * columns * experts.compute_dtype.itemsize


def make_stack(
    recipe: Recipe, weights: Weights, experts: Experts4bit, leaf: str, storage_dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Read the experts of one projection, one at a time, and return their stack `[M, 1]` on the device.

    Args:
        recipe (`Recipe`): The stack's.
        weights (`Weights`): The checkpoint.
        experts (`Experts4bit`): The module it belongs to.
        leaf (`str`): Which projection.
        storage_dtype (`torch.dtype`): Dtype the stack is viewed in.
        device (`torch.device`): Where experts are quantised.
    """
    if not recipe.quant_states:
        return experts.quantize(leaf, _read_experts(recipe, weights, experts.shapes[leaf]), storage_dtype, device)
    layout, sources = experts.layouts[leaf], list(recipe.sources.values())
    stack = torch.zeros(layout.packed_shape(storage_dtype), dtype=storage_dtype, device=device)
    # Gate and up of an expert are neighbours in the stack; in the recipe, all gates come before all ups.
    for index, name in enumerate(name for expert in zip(*sources, strict=True) for name in expert):
        scales = {role: weights.read(stored) for role, stored in recipe.quant_states[name].items()}
        state = QuantState.from_dict(scales, device=device)
        insert_piece(stack, index, pack(weights.read(name).to(device), state, layout.piece, storage_dtype), layout)
        weights.release([name, *recipe.quant_states[name].values()])
    return stack


def check_stack(recipe: Recipe, weights: Weights, experts: Experts4bit, leaf: str) -> None:
    """Check from the headers that experts that are stored quantised are of the kind and size that the stack is made of.

    Raises:
        ValueError: Names a tensor that is not.
    """
    layout, piece = experts.layouts[leaf], experts.layouts[leaf].piece
    expected = (piece.quant_type, piece.double_quant, piece.codes_bytes, piece.absmax_bytes)
    names = [name for names in recipe.sources.values() for name in names] if recipe.quant_states else []
    for name in names:
        stored = stored_kind(name, recipe.quant_states.get(name, {}), weights)
        if len(names) != layout.num_pieces or stored != expected:
            raise ValueError(
                f"{name!r} is stored as {stored[0] or 'an unknown type'}, double_quant={stored[1]}, {stored[2]:,} "
                f"bytes of codes and {stored[3]:,} of scales, one of {len(names)}, but {recipe.targets[0]!r} consists "
                f"of {layout.num_pieces} matrices, each {piece} ({piece.codes_bytes:,} and {piece.absmax_bytes:,} "
                "bytes). Load the 16-bit checkpoint instead; it is quantised while it is read."
            )


def find_parts(recipe: Recipe, weights: Weights, shape: tuple[int, ...]) -> dict[str, Part] | None:
    """Return which part of a stack `[E, N, K]` each stored tensor is, if each of them is the rows of one expert.

    Args:
        recipe (`Recipe`): The stack's, with a conversion.
        weights (`Weights`): The checkpoint.
        shape (`tuple[int, ...]`): Of the stack.
    """
    assert recipe.converter is not None
    steps = [(type(step), getattr(step, "dim", None)) for step in recipe.converter.operations]
    if len(shape) != 3 or steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return None
    parts: dict[str, Part] = {}
    start = 0
    for pattern in recipe.converter.source_patterns:
        names = recipe.sources.get(pattern, [])
        if len(names) != shape[0]:
            return None
        # Of a tensor in 4 bits, only the number of weights is known.
        heights = {_num_weights(name, recipe, weights) // shape[2] for name in names}
        if len(heights) != 1:
            return None
        (height,) = heights
        parts |= {name: Part(expert, start, start + height) for expert, name in enumerate(names)}
        start += height
    return parts if start == shape[1] else None


def _num_weights(name: str, recipe: Recipe, weights: Weights) -> int:
    num_weights = math.prod(weights.tensors[name].shape)
    return weights.tensors[name].num_bytes * 2 if name in recipe.quant_states else num_weights


def _read_experts(recipe: Recipe, weights: Weights, shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    """Yield the matrix `[N, K]` of one expert after the other."""
    if _is_intertwined(recipe, shape[0]):
        ((tensor, _),) = recipe.realize(weights.read).values()
        yield from tensor
        return
    for expert in range(shape[0]):
        if recipe.converter is None:
            yield weights.read_row(recipe.stored_names[0], expert)
            continue
        sources = {pattern: [names[expert]] for pattern, names in recipe.sources.items()}
        ((tensor, _),) = dataclasses.replace(recipe, sources=sources).realize(weights.read).values()
        assert tensor.shape == (1, *shape[1:]), f"{recipe.targets[0]} of one expert is {list(tensor.shape)}"
        yield tensor[0]
        weights.release(names[0] for names in sources.values())


def _is_intertwined(recipe: Recipe, num_experts: int) -> bool:
    """Return whether the experts come out of a conversion of other tensors than one or more for each of them."""
    return recipe.converter is not None and any(len(names) != num_experts for names in recipe.sources.values())

"""From the names in a checkpoint to the parameters of a model.

A checkpoint is rarely written the way a model is built: transformers renames tensors, adds or strips prefixes, splits
and stacks them while it loads. A `Recipe` is one such step worked out in advance from names and shapes alone: which
stored tensors it reads, and which parameters come out. With all recipes known before the first byte is read, a
missing, unexpected or misshapen tensor is an error at once, and the work can be split between ranks.

The rules themselves are upstream's (`transformers.conversion_mapping`), applied by upstream's own functions.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..experts.layers import Experts4bit
from ..packed_linear import PackedLinear4bit
from ..packing import PackedLayout
from .weights import Weights

_QUANT_STATE_SUFFIX = re.compile(
    r"^(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
"""What bitsandbytes stores beside a quantised weight, `QuantState.as_dict(packed=True)`."""

_SHOWN = 5


@dataclass
class Recipe:
    """Stored tensors in, parameters out.

    Args:
        targets (`list[str]`): Parameters (or buffers) of the model that come out.
        sources (`dict[str, list[str]]`): Stored tensors to read, by the pattern that claimed them.
        converter (`WeightConverter`, *optional*): What to do with them. `None` where one becomes one.
        quant_state (`dict[str, str]`): Stored scales of an already quantised weight, by their role.
        quant_states (`dict[str, dict[str, str]]`): The same for each of several weights, where experts are stacked.
        duplicate (`str`, *optional*): A second stored copy, of a weight that the config ties to this one.
        shapes (`_Shapes`, *optional*): What a converter may ask about the model.
    """

    targets: list[str]
    sources: dict[str, list[str]]
    converter: WeightConverter | None = None
    quant_state: dict[str, str] = field(default_factory=dict)
    quant_states: dict[str, dict[str, str]] = field(default_factory=dict)
    duplicate: str | None = None
    shapes: _Shapes | None = None

    @property
    def stored_names(self) -> list[str]:
        names = [name for names in self.sources.values() for name in names] + list(self.quant_state.values())
        names += [name for state in self.quant_states.values() for name in state.values()]
        return [*names, self.duplicate] if self.duplicate else names

    def num_bytes(self, weights: Weights) -> int:
        return sum(weights.tensors[name].num_bytes for name in self.stored_names)

    def transient_bytes(self, weights: Weights, dtype: torch.dtype) -> int:
        """Return what is in memory while this is made, beside its final form.

        That is all it reads, and once more in the parameter dtype what is quantised from that or comes out of a
        conversion. A weight that is taken as it is stored has its final form in that dtype.
        """
        assert self.shapes is not None
        shapes = self.shapes
        passing = [] if self.quant_state else [t for t in self.targets if self.converter or shapes.is_packed(t)]
        made = [math.prod(shapes.shape(name)) for name in passing]
        return self.num_bytes(weights) + dtype.itemsize * sum(made)

    def realize(self, read: Callable[[str], torch.Tensor]) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Read the sources and return each target's tensor, with its scales if it was stored quantised.

        Args:
            read (`Callable`): Reads one stored tensor by name.
        """
        scales = {role: read(name) for role, name in self.quant_state.items()}
        if self.converter is None:
            tensor = read(self.stored_names[0])
            if self.duplicate and not torch.equal(tensor, read(self.duplicate)):
                raise ValueError(
                    f"config.json ties {self.stored_names[0]!r} and {self.duplicate!r}, but the checkpoint holds "
                    "different values for them. Load with tie_word_embeddings=False (in model_init_kwargs)."
                )
            return {self.targets[0]: (tensor, scales)}
        return {name: (tensor, {}) for name, tensor in _convert(self, read).items()}


def plan_recipes(model: PreTrainedModel, weights: Weights, key_mapping: dict[str, str] | None = None) -> list[Recipe]:
    """Work out how every parameter of a model on the meta device is made from a checkpoint.

    Args:
        model (`PreTrainedModel`): The model, on the meta device, its 4-bit layers in place.
        weights (`Weights`): The checkpoint.
        key_mapping (`dict[str, str]`, *optional*): Renamings of the caller's own, as in `from_pretrained`.
    Raises:
        ValueError: A tensor is missing, unexpected, or has a shape that the config does not describe.
    """
    expected = dict(model.state_dict())
    stored_weights, quant_states = _separate_quant_states(weights)
    recipes, unexpected = _match_names(model, stored_weights, expected, key_mapping)
    recipes = _merge_tied(model, recipes)
    shapes = _Shapes(model, expected)
    for recipe in recipes:
        (first, *_) = recipe.stored_names
        recipe.shapes = shapes
        if stacked_experts(model, recipe.targets[0]):
            recipe.quant_states = {name: quant_states[name] for name in recipe.stored_names if name in quant_states}
        else:
            recipe.quant_state = quant_states.get(first, {})
        if recipe.quant_state:
            _check_quantized(recipe, model, weights)
        elif not recipe.quant_states:
            _check_shapes(recipe, weights)
    _check_complete(model, recipes, unexpected, set(expected))
    return recipes


def is_packed(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is the packed weight of a 4-bit layer."""
    path, _, leaf = name.rpartition(".")
    return isinstance(model.get_submodule(path), PackedLinear4bit) and leaf == "weight"


def logical_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape that a parameter has in a 16-bit checkpoint: for a packed layer, that of its weight."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if is_packed(model, name):
        rows, columns = module.layout.shape
        return (columns, rows) if module.source_cls is Conv1D else (rows, columns)
    experts = stacked_experts(model, name)
    return experts.shapes[leaf] if experts else tuple(getattr(module, leaf).shape)


def stacked_experts(model: nn.Module, name: str) -> Experts4bit | None:
    """Return the experts whose matrices are stacked in a parameter, `None` for any other parameter."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module if isinstance(module, Experts4bit) and leaf in module.layouts else None


def _separate_quant_states(weights: Weights) -> tuple[list[str], dict[str, dict[str, str]]]:
    names: list[str] = []
    quant_states: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        match = _QUANT_STATE_SUFFIX.match(name)
        if match:
            quant_states.setdefault(match["weight"], {})[match["part"]] = name
        else:
            names.append(name)
    return names, quant_states


def _match_names(
    model: PreTrainedModel, names: list[str], expected: dict[str, torch.Tensor], key_mapping: dict[str, str] | None
) -> tuple[list[Recipe], list[str]]:
    rules = get_model_conversion_mapping(model, key_mapping, None)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    recipes: dict[str, Recipe] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=_natural_order):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            unexpected.append(name)
        elif pattern is None:
            if target in recipes:
                raise ValueError(
                    f"The checkpoint holds both {recipes[target].stored_names[0]!r} and {name!r}, which are {target!r} "
                    f"in {type(model).__name__}, and only one can be. Remove one of them from the checkpoint."
                )
            recipes[target] = Recipe([target], {name: [name]})
        else:
            recipe = recipes.setdefault(target, Recipe([target], {}, copy.deepcopy(by_pattern[pattern])))
            recipe.sources.setdefault(pattern, []).append(name)
    return list(recipes.values()), unexpected


def _merge_tied(model: PreTrainedModel, recipes: list[Recipe]) -> list[Recipe]:
    """Read a weight that is tied to another, and stored all the same, only to see that both are equal."""
    by_target = {recipe.targets[0]: recipe for recipe in recipes}
    for target, source in model.all_tied_weights_keys.items():
        if target in by_target and source in by_target:
            by_target[source].duplicate = by_target.pop(target).stored_names[0]
        elif target in by_target:
            by_target[source] = by_target.pop(target)
            by_target[source].targets = [source]
    return list(by_target.values())


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """Order layer 2 before layer 10: conversions that stack tensors stack them in this order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


class _Shapes:
    """Stands in for the model where a conversion asks it for shapes: those of its weights before they are in 4 bits.

    By the time a conversion runs, the model's own parameters are packed, wrapped by PEFT, or sharded.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.config = model.config
        self._empty = {name: torch.empty(logical_shape(model, name), device="meta") for name in names}
        self._packed = {name for name in self._empty if is_packed(model, name)}

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._empty[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._empty[name].shape)

    def is_packed(self, name: str) -> bool:
        return name in self._packed

    def __contains__(self, name: str) -> bool:
        return name in self._empty


def _convert(recipe: Recipe, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    assert recipe.converter is not None and recipe.shapes is not None
    converter: Any = copy.deepcopy(recipe.converter)  # is annotated to take futures, and takes tensors too
    for pattern, names in recipe.sources.items():
        for name in names:
            converter.add_tensor(recipe.targets[0], name, pattern, read(name))
    converted = converter.convert(recipe.targets[0], model=recipe.shapes, config=recipe.shapes.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _check_shapes(recipe: Recipe, weights: Weights) -> None:
    assert recipe.shapes is not None
    (name, *_) = recipe.stored_names
    if f"{name}.absmax" in weights.tensors:
        raise ValueError(
            f"{name!r} is stored in 4 bits, but not as one matrix: what is in it shares its scales, and is not taken "
            "apart. Load the 16-bit checkpoint instead; it is quantised while it is read."
        )
    if recipe.converter is None:
        shapes = {recipe.targets[0]: weights.tensors[recipe.stored_names[0]].shape}
    else:
        # A dry run without memory tells the names and shapes that come out.
        dry = _convert(recipe, lambda name: torch.empty(weights.tensors[name].shape, device="meta"))
        recipe.targets = list(dry)
        shapes = {name: tuple(tensor.shape) for name, tensor in dry.items()}
    for name, shape in shapes.items():
        if name in recipe.shapes and shape != recipe.shapes.shape(name):
            raise ValueError(
                f"{recipe.stored_names[0]!r} gives {name!r} the shape {list(shape)}, but config.json describes "
                f"{list(recipe.shapes.shape(name))}. Weights and config do not belong together; download both from "
                "one revision."
            )


def stored_router_layout(recipe: Recipe, model: PreTrainedModel, weights: Weights) -> PackedLayout | None:
    """Return how a matrix is stored in 4 bits that is no linear layer's now, as routers were one before transformers 5.

    In the model it is in 16 bits. For what is a linear layer, left in 16 bits or not, this is `None`.
    """
    path, _, leaf = recipe.targets[0].rpartition(".")
    module = model.get_submodule(path)
    if recipe.converter is not None or not recipe.quant_state or isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return None
    quant_type, double_quant, codes_bytes, _ = stored_kind(recipe.stored_names[0], recipe.quant_state, weights)
    shape = tuple(getattr(module, leaf).shape)
    if len(shape) != 2 or math.prod(shape) != 2 * codes_bytes:
        return None
    return PackedLayout((shape[0], shape[1]), quant_type, double_quant)


def stored_kind(name: str, state: Mapping[str, str], weights: Weights) -> tuple[str, bool, int, int]:
    """Return of a stored quantised weight what the headers say: its type, `double_quant`, bytes of codes and scales."""
    marker = next((part for part in state if part.startswith("quant_state.")), "")
    absmax_bytes = weights.tensors[state["absmax"]].num_bytes if "absmax" in state else 0
    return marker.rpartition("__")[2], "nested_absmax" in state, weights.tensors[name].num_bytes, absmax_bytes


def _check_quantized(recipe: Recipe, model: PreTrainedModel, weights: Weights) -> None:
    """Check from the headers that a stored quantised weight has a 4-bit layer, of its own kind and size, to go to."""
    if stored_router_layout(recipe, model, weights):
        return
    name, target = recipe.stored_names[0], recipe.targets[0]
    module = model.get_submodule(target.rpartition(".")[0])
    if recipe.converter is not None or not isinstance(module, PackedLinear4bit):
        raise ValueError(
            f"{name!r} is stored in 4 bits, but {target!r} is no 4-bit layer of its own in {type(model).__name__}: "
            "it is listed in llm_int8_skip_modules, or made of several stored weights. Load the 16-bit checkpoint "
            "instead; it is quantised while it is read."
        )
    layout, stored = module.layout, stored_kind(name, recipe.quant_state, weights)
    if stored != (layout.quant_type, layout.double_quant, layout.codes_bytes, layout.absmax_bytes):
        raise ValueError(
            f"{name!r} is stored as {stored[0] or 'an unknown type'}, double_quant={stored[1]}, {stored[2]:,} bytes of "
            f"codes and {stored[3]:,} of scales, but config.json describes {layout} ({layout.codes_bytes:,} and "
            f"{layout.absmax_bytes:,} bytes). Weights and config do not belong together; download both from one "
            "revision."
        )


def _check_complete(model: PreTrainedModel, recipes: list[Recipe], unexpected: list[str], expected: set[str]) -> None:
    made = {target for recipe in recipes for target in recipe.targets}
    # A tied weight is made as soon as one of its names is.
    tied = {
        name
        for target, source in model.all_tied_weights_keys.items()
        for name in (target, source)
        if {target, source} & made
    }
    missing = _without_ignored(expected - made - tied, model._keys_to_ignore_on_load_missing)
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of the tensors that {type(model).__name__} needs: {_some(missing)}. "
            "They would be left at random values. Download the checkpoint again, or pass key_mapping if it uses other "
            "names."
        )
    # Checkpoints of old carry what is computed today: each layer's rotary frequencies, and the position ids.
    computed = {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}
    stray = _without_ignored(set(unexpected), computed | set(model._keys_to_ignore_on_load_unexpected or ()))
    if stray:
        raise ValueError(
            f"The checkpoint holds {len(stray)} tensors that {type(model).__name__} has no place for: {_some(stray)}. "
            "They would be dropped. Check that config.json belongs to these weights, or pass key_mapping if they "
            "have other names."
        )


def _without_ignored(names: set[str], patterns: list[str] | set[str] | None) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns or ()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

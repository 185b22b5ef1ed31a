"""What a merge will do with each stored tensor, worked out before the first byte is read or written.

A checkpoint has names of its own, and an adapter speaks of the parameters of the model; `loading/recipes.py` knows
which is which. A `Slot` joins the two: a stored tensor, the parameter that it is, or which part of it, the `Edit` that
the adapter makes of it, and the layout in which it is quantised, if the merge has to do with 4 bits at all.

Experts are one parameter a projection, and are stored as one tensor or, expert by expert, as many: either way they are
merged expert by expert, and written in the form that they were found in. Any other parameter that transformers makes of
several stored tensors passes through untouched, name by name. If it would have to change, the merge is refused.

**Experts in 4 bits.** In training with this package they were rounded like every linear layer, which is what an adapter
with a `base_quantization.json` says. Elsewhere they were not, since bitsandbytes leaves stacked experts alone. Nor can
transformers read them in 4 bits: a 4-bit output has them in 16, unless the base had them in 4.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy import build_meta_model, is_tied, keep_in_float32
from ..loading.blueprint import pack_expert_layers, pack_linear_layers
from ..loading.expert_recipes import check_stack, find_parts
from ..loading.recipes import Recipe, logical_shape, plan_recipes, stacked_experts, stored_router_layout
from ..loading.weights import Weights
from ..lora_math import Edit, Part, same_effect
from ..packed_linear import PackedLinear4bit
from ..packing import PackedLayout
from ..quantization import FIELDS, QUANTIZATION_FILE
from ..ranks import log_once
from .edits import Adapter
from .shards import read_dtypes


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Args:
        trained (`bool`): Merge onto the weights that the adapter was trained against, rather than the original ones.
        dtype (`torch.dtype`, *optional*): Of what is written. Defaults to that of each base tensor.
        save_4bit (`bool`): Whether the output is quantised.
        quant_type (`str`): `"nf4"` or `"fp4"`, in training and in the output.
        double_quant (`bool`): Whether the block scales are quantised as well.
        skip_modules (`tuple[str, ...]`, *optional*): Modules left in 16 bits. Defaults to the head.
        compute_dtype (`torch.dtype`): What the weights were quantised from in training, and dequantised to.
    """

    trained: bool = False
    dtype: torch.dtype | None = None
    save_4bit: bool = False
    quant_type: str = "nf4"
    double_quant: bool = True
    skip_modules: tuple[str, ...] | None = None
    compute_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Slot:
    """One stored tensor and its fate.

    Args:
        source (`str`): Its name in the base. In the output it may have another, if tied weights are untied.
        target (`str`): The parameter that it is.
        dtype (`torch.dtype`): Dtype of what is written.
        edit (`Edit`, *optional*): What the adapter does to it.
        layout (`PackedLayout`, *optional*): How it, or each piece of it, is quantised, in training or in the output.
        turned (`bool`): Whether it is stored as the transpose of what is quantised, as those of Conv1D are.
        scales (`dict[str, str]`): Stored scales, by role, of a base in 4 bits.
        part (`Part`, *optional*): Which part of the parameter it is.
        is_stack (`bool`): Whether it is that of all experts, which are then merged one after the other.
    """

    source: str
    target: str
    dtype: torch.dtype
    edit: Edit | None = None
    layout: PackedLayout | None = None
    turned: bool = False
    scales: dict[str, str] = field(default_factory=dict)
    part: Part | None = None
    is_stack: bool = False

    @property
    def is_expert(self) -> bool:
        """Whether it is of experts."""
        return self.is_stack or self.part is not None


class MergePlan:
    """All slots of a merge.

    Args:
        config (`PretrainedConfig`): The base's config.
        weights (`Weights`): Its tensors.
        adapter (`Adapter`): The adapter.
        options (`MergeOptions`): How to merge.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
    Raises:
        ValueError: Something cannot be merged rightly.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        adapter: Adapter,
        options: MergeOptions,
        trust_remote_code: bool,
    ) -> None:
        self.config, self.weights, self.adapter, self.options = config, weights, adapter, options
        self._build = functools.partial(build_meta_model, trust_remote_code=trust_remote_code)
        stored = getattr(config, "quantization_config", None)
        self.pre_quantized = stored is not None
        self.quantization = settle_quantization(stored, options)
        self.model = self._build_quantized()
        recipes = plan_recipes(self.model, weights)
        edits = adapter.plan_edits(self.model, functools.partial(logical_shape, self.model))
        self.untied = self._settle_tied(edits)
        self.dtypes: dict[str, torch.dtype] = {}
        for file in {tensor.file for tensor in weights.tensors.values()}:
            self.dtypes |= read_dtypes(file)
        self._float32_parts = keep_in_float32(self.model, options.dtype) if options.dtype else []
        self.scales = {name for recipe in recipes for name in recipe.quant_state.values()}
        self.scales |= {name for recipe in recipes for state in recipe.quant_states.values() for name in state.values()}
        self.slots = {name: slot for recipe in recipes for name, slot in self._plan_slots(recipe, edits)}

    def files(self) -> dict[str, list[str]]:
        """Return the names to write, by file of the base. A name that the base lacks goes where its source is."""
        by_file: dict[str, list[str]] = {}
        for name, tensor in self.weights.tensors.items():
            by_file.setdefault(tensor.file, []).append(name)
        for name in sorted(set(self.slots) - set(self.weights.tensors)):
            by_file[self.weights.tensors[self.slots[name].source].file].append(name)
        return by_file

    def _build_quantized(self) -> PreTrainedModel:
        """Build the model on the meta device, with packed layers where weights are, were or will be in 4 bits."""
        model = self._build(self.config, self.options.compute_dtype)
        if self.quantization is None:
            return model
        compute_dtype = self.options.compute_dtype
        quantizer = pack_linear_layers(model, self.quantization, self.pre_quantized, compute_dtype, torch.uint8)
        # Experts of a kind that cannot be packed were not, here or elsewhere.
        with contextlib.suppress(ValueError):
            skipped = quantizer.modules_to_not_convert
            pack_expert_layers(model, self.quantization, skipped, compute_dtype, torch.uint8)
        if not self.pre_quantized:
            skipped = self.quantization.llm_int8_skip_modules = sorted(set(quantizer.modules_to_not_convert))
            recorded = self.adapter.quantization.get("skip_modules", skipped)
            if self.options.trained and skipped != recorded:
                raise ValueError(
                    f"skip_modules would leave {skipped} in 16 bits, but {QUANTIZATION_FILE} in "
                    f"{self.adapter.source!r} says that {recorded} were left so in training. Leave skip_modules out."
                )
        return model

    def _settle_tied(self, edits: dict[str, Edit]) -> dict[str, str]:
        """Decide whether tied weights stay tied; the edits of those that do are left on the stored one alone.

        Returns:
            `dict[str, str]`: The parameters that are untied, and from which.
        """
        untied = {}
        for target, source in self.model.all_tied_weights_keys.items():
            if not {target, source} & set(edits):
                continue
            one, other = (edits.get(name, Edit(name, logical_shape(self.model, name))) for name in (source, target))
            if one.row_values and not other.row_values:
                # PEFT lets a tied head share the rows that it trains in the embedding.
                other = replace(other, row_values=one.row_values, rows=one.rows)
            if same_effect(one, other, self.adapter.read):
                edits[source] = one
                edits.pop(target, None)
            else:
                edits[source], edits[target] = one, other
                untied[target] = source
        if untied:
            config = copy.deepcopy(self.config)
            config.tie_word_embeddings = False
            if is_tied(self._build(config, torch.bfloat16)):
                raise ValueError(
                    f"The adapter in {self.adapter.source!r} does not do the same to {untied}, which "
                    f"{type(self.model).__name__} ties whatever its config says, so no checkpoint can hold the merged "
                    "model. Use the adapter unmerged, or train with ensure_weight_tying=True."
                )
            log_once("The adapter changes one of two tied weights, or both unlike: the merged model has them untied.")
        return untied

    def _plan_slots(self, recipe: Recipe, edits: dict[str, Edit]) -> Iterator[tuple[str, Slot]]:
        if recipe.converter is not None:
            parts = find_parts(recipe, self.weights, logical_shape(self.model, recipe.targets[0]))
            if parts and len(recipe.targets) == 1:
                yield from self._plan_experts(recipe, parts, edits.get(recipe.targets[0]))
                return
            touched = next((target for target in recipe.targets if target in edits or self._layer(target)), None)
            if touched:
                raise ValueError(
                    f"{touched!r} is made of {len(recipe.stored_names)} stored tensors ({recipe.stored_names[0]!r}, "
                    "...), and what would be merged cannot be taken apart into these again. Use the adapter "
                    "unmerged, with PeftModel.from_pretrained; if it does not adapt this module, "
                    "base_weights='original' leaves it alone."
                )
            return
        (target,) = recipe.targets
        (stored,) = next(iter(recipe.sources.values()))
        if stacked_experts(self.model, target) or (target in edits and edits[target].num_experts):
            yield from self._plan_experts(recipe, {stored: None}, edits.get(target))
            return
        layer, scales = self._layer(target), recipe.quant_state
        layout, turned = (layer.layout, layer.source_cls is Conv1D) if layer else (None, False)
        layout = layout or stored_router_layout(recipe, self.model, self.weights)
        twins = [name for name, source in self.model.all_tied_weights_keys.items() if source == target]
        split = [name for name in twins if name in self.untied]
        # A tied weight may be stored under the name of either of the two, or of both.
        owner = stored if stored in split else target
        names = {stored: owner}
        if recipe.duplicate:
            names[recipe.duplicate] = next(iter(split), target)
        elif split:
            names |= {name: name for name in (target, *split) if name != owner}
        for name, parameter in names.items():
            source = name if name in self.weights.tensors else stored
            dtype = self._dtype(source, parameter, scales)
            yield name, Slot(source, parameter, dtype, edits.get(parameter), layout, turned, scales)

    def _plan_experts(
        self, recipe: Recipe, parts: Mapping[str, Part | None], edit: Edit | None
    ) -> Iterator[tuple[str, Slot]]:
        """Plan the tensors that a stack of experts is made of, or the one that it is."""
        (target,) = recipe.targets
        experts, layout = stacked_experts(self.model, target), None
        if experts and recipe.quant_states:
            check_stack(recipe, self.weights, experts, target.rpartition(".")[2])
        if experts and (recipe.quant_states or (self.options.trained and self.adapter.quantization)):
            layout = experts.layouts[target.rpartition(".")[2]].piece
        elif experts and self.options.trained:
            log_once(
                "Nothing says that experts were in 4 bits in training: they are left in 16, as by bitsandbytes. "
                "Adapters of this package say it in %s.",
                QUANTIZATION_FILE,
            )
        if self.options.save_4bit and not recipe.quant_states:
            log_once("Experts are written in 16 bits: transformers cannot read them in 4 where it stacks them.")
        for name, part in parts.items():
            scales = recipe.quant_states.get(name, {})
            dtype = self._dtype(name, target, scales)
            yield name, Slot(name, target, dtype, edit, layout, scales=scales, part=part, is_stack=part is None)

    def _layer(self, target: str) -> PackedLinear4bit | None:
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        return module if isinstance(module, PackedLinear4bit) and leaf == "weight" else None

    def _dtype(self, stored: str, target: str, scales: dict[str, str]) -> torch.dtype:
        dtype = self.dtypes[stored]
        if scales:  # codes are stored in any dtype, and mean none
            dtype = getattr(self.config, "dtype", None) or self.options.compute_dtype
        # What transformers keeps in float32 would lose precision on the way through another dtype.
        if self.options.dtype is None or any(part in target for part in self._float32_parts):
            return dtype
        return self.options.dtype if dtype.is_floating_point else dtype


def read_stored_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Return how a base is stored in 4 bits, by the names in `quantization.FIELDS`; of any other base, nothing."""
    stored: Any = getattr(config, "quantization_config", None) or {}
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if not fields.get("load_in_4bit"):
        return {}
    settled = BitsAndBytesConfig.from_dict(dict(fields))
    # All but the dtype that matrices are multiplied in, which is the training's.
    return {name: getattr(settled, FIELDS[name]) for name in ("quant_type", "double_quant", "skip_modules")}


def settle_quantization(stored: Any, options: MergeOptions) -> BitsAndBytesConfig | None:
    """Return how weights are quantised, in the base, in training or in the output; `None` where they never are."""
    if stored is not None:
        fields = stored if isinstance(stored, dict) else stored.to_dict()
        if not fields.get("load_in_4bit"):
            raise ValueError(
                f"The base is quantised by {fields.get('quant_method')!r}, and only 4-bit weights of bitsandbytes "
                "can be read here. Merge onto the 16-bit checkpoint that it was made from."
            )
        if not options.trained:
            raise ValueError(
                "base_weights='original', but the base is stored in 4 bits and its original weights are not in it. "
                "Pass the 16-bit checkpoint that it was made from, or base_weights='trained' to merge onto what is "
                "stored."
            )
        return BitsAndBytesConfig.from_dict(fields)
    if not options.trained and not options.save_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=options.dtype or options.compute_dtype,
        llm_int8_skip_modules=None if options.skip_modules is None else [*options.skip_modules],
    )

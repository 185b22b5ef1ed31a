"""What a merge will do with each stored tensor, worked out before the first byte is read or written.

A checkpoint has names of its own, and an adapter speaks of the parameters of the model; `recipes.py` knows which is
which. A `Slot` joins the two: a stored tensor, the parameter that it is, the `Edit` that the adapter makes of it, and
the 4-bit layer that it is quantised for, if the merge has to do with 4 bits at all.

A parameter that transformers makes of several stored tensors (stacked experts, for one) passes through untouched, name
by name. If it would have to change, the merge is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from .adapter_edits import Adapter
from .anatomy import build_meta_model, is_tied, keep_in_float32
from .blueprint import pack_linear_layers
from .lora_math import Edit, same_effect
from .packing import PackedLinear4bit
from .quantization import FIELDS, QUANTIZATION_FILE
from .ranks import log_once
from .recipes import Recipe, logical_shape, plan_recipes
from .shards import read_dtypes
from .weights import Weights


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
        layer (`PackedLinear4bit`, *optional*): The layer that it is quantised for, in training or in the output.
        scales (`dict[str, str]`): Stored scales, by role, of a base in 4 bits.
    """

    source: str
    target: str
    dtype: torch.dtype
    edit: Edit | None = None
    layer: PackedLinear4bit | None = None
    scales: dict[str, str] = field(default_factory=dict)


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
        layers = {target: self._layer(target) for target in recipe.targets}
        if recipe.converter is not None:
            touched = next((target for target in recipe.targets if target in edits or layers[target]), None)
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
        layer, scales = layers[target], recipe.quant_state
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
            yield name, Slot(source, parameter, dtype, edits.get(parameter), layer, scales)

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

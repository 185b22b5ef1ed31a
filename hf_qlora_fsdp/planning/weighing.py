"""What a model weighs, from its config alone: every parameter of every unit, without a byte of memory for any of them.

The model is built on the meta device by the same functions that build it for loading (`loading/blueprint.py`), with its
packed 4-bit layers and its adapter. Only it is short: decoder layers whose parameters have the same names and shapes
weigh the same and compute the same, so one of each kind is packed, adapted and kept, and the others are counted. A
model of 126 layers takes a second then, and its one layer can be run to see what it needs (`layer_trial.py`).

Sizes are FSDP's. A parameter is cut along its first dimension, so a rank's part is `ceil(rows / ranks)` rows whatever
the rank; what is gathered is that times the ranks, with the padding.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from ..anatomy import Unit, build_meta_model, decoder_layers, plan_units
from ..experts.layers import Experts4bit
from ..loading.adapters import check_peft_config, inject_adapter
from ..loading.blueprint import pack_expert_layers, pack_linear_layers, settle_quantization
from ..loading.random_weights import draw_weights
from ..offloading.offload import padded_bytes
from ..packed_linear import PackedLinear4bit
from ..sharding import float32_parameters
from .model_config import read_config


@dataclass(frozen=True)
class Part:
    """One parameter.

    Args:
        rows (`int`): Size of its first dimension, along which it is cut.
        row_bytes (`int`): Bytes of one of them, as it lies in a shard.
        gathered_bytes (`int`): The same, as it is gathered: what is trained is cast to the parameter dtype.
        codes_share (`float`): Of a packed weight, which part of the bytes are 4-bit codes; the others are scales.
        kind (`str`): `"packed"`, `"plain"` (frozen, in 16 bits) or `"trained"`.
        is_matrix (`bool`): Whether it is offloaded with its unit.
        is_whole (`bool`): Whether every rank holds all of it.
    """

    rows: int
    row_bytes: int
    gathered_bytes: int
    kind: str
    codes_share: float = 0.0
    is_matrix: bool = True
    is_whole: bool = False

    def shard(self, num_ranks: int) -> int:
        """Return the bytes of a rank's part."""
        return (self.rows if self.is_whole else math.ceil(self.rows / num_ranks)) * self.row_bytes

    def gathered(self, num_ranks: int) -> int:
        """Return the bytes of what is gathered."""
        return 0 if self.is_whole else math.ceil(self.rows / num_ranks) * num_ranks * self.gathered_bytes


@dataclass(frozen=True, eq=False)
class Parts:
    """The parameters of a unit. Layers of one kind share them, and what was added up of them.

    Args:
        parts (`tuple[Part, ...]`): One by one.
    """

    parts: tuple[Part, ...]

    @functools.cache  # noqa: B019  lives as long as the model is on the scales
    def shards(self, num_ranks: int) -> Counter[str]:
        """Return a rank's bytes by what they are: `"codes"`, `"scales"`, `"plain"`, `"trained"`."""
        sizes: Counter[str] = Counter()
        for part in self.parts:
            size = part.shard(num_ranks)
            if part.kind == "packed":
                codes = round(size * part.codes_share)
                sizes += Counter(codes=codes, scales=size - codes)
            else:
                sizes["trained" if part.kind == "trained" else "plain"] += size
        return sizes

    @functools.cached_property
    def frozen_matrices(self) -> Parts:
        """What goes to the host if the unit is offloaded."""
        kept = (part for part in self.parts if part.is_matrix and not part.is_whole and part.kind != "trained")
        return Parts(tuple(kept))

    @functools.cached_property
    def replicated(self) -> Parts:
        """The same, with what is frozen left whole on every rank."""
        return Parts(tuple(part if part.kind == "trained" else replace(part, is_whole=True) for part in self.parts))

    @functools.cached_property
    def whole_bytes(self) -> int:
        """The bytes of what every rank holds."""
        return sum(part.shard(1) for part in self.parts if part.is_whole)

    @functools.cache  # noqa: B019
    def region(self, num_ranks: int) -> int:
        """Return the size of their region in host memory, each aligned in it (`offloading/offload.py`)."""
        return sum(padded_bytes(part.shard(num_ranks)) for part in self.parts)

    @functools.cache  # noqa: B019
    def gathered(self, num_ranks: int) -> int:
        """Return U, the bytes of the whole unit."""
        return sum(part.gathered(num_ranks) for part in self.parts)

    def trained_numel(self, num_ranks: int) -> int:
        """Return how many weights are trained, with the padding of all ranks."""
        return self.shards(num_ranks)["trained"] * num_ranks // 4

    @property
    def final_bytes(self) -> int:
        """The bytes of what is frozen, whole."""
        sizes = self.shards(1)
        return sizes.total() - sizes["trained"]


@dataclass(frozen=True)
class UnitWeight:
    """What FSDP gathers and frees as one.

    Args:
        unit (`Unit`): What it consists of. `name` is `""` for what belongs to no unit, and so to the root.
        parts (`Parts`): Its parameters.
        kind (`str`): Name of the layer of the short model that it is like, or `""`.
        transient_bytes (`int`): T, the most that one of its tensors takes on the card while it is quantised.
    """

    unit: Unit
    parts: Parts
    kind: str = ""
    transient_bytes: int = 0


@dataclass
class ModelWeight:
    """A model on the scales.

    Args:
        config (`PretrainedConfig`): Its config, of the full length.
        short (`nn.Module`): The `PeftModel` on the meta device with one layer of each kind.
        units (`list[UnitWeight]`): All units, in the order of the forward, the root's rest at the end.
        param_dtype (`torch.dtype`): Dtype of the computation.
        num_packed (`int`): Parameters in 4 bits, counted as they were in 16.
    """

    config: PretrainedConfig
    short: Any
    units: list[UnitWeight]
    param_dtype: torch.dtype
    num_packed: int = 0
    trials: dict[Any, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[UnitWeight]:
        return [unit for unit in self.units if unit.unit.is_decoder_layer]

    @property
    def base(self) -> PreTrainedModel:
        """The short transformers model."""
        return self.short.get_base_model()


def weigh_model(
    model: str | PretrainedConfig,
    *,
    lora_r: int = 16,
    target_modules: str | list[str] = "all-linear",
    peft_config: LoraConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    param_dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    **hub: Any,
) -> ModelWeight:
    """Weigh a model with its adapter.

    Args:
        model (`str` or `PretrainedConfig`): Hub id, folder, `config.json`, or a config.
        lora_r (`int`): Rank of the adapter.
        target_modules (`str` or `list[str]`): What it adapts.
        peft_config (`LoraConfig`, *optional*): All of the adapter, in place of the two.
        quantization_config (`BitsAndBytesConfig`, *optional*): NF4 with double quantisation by default.
        param_dtype (`torch.dtype`): Dtype of the computation and of what is not in 4 bits.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        **hub: `revision`, `token` and the like.
    Raises:
        ValueError: There is no such model, or it cannot be held in 4 bits or adapted so.
    """
    config = copy.deepcopy(read_config(model, trust_remote_code=trust_remote_code, **hub))
    stored = getattr(config, "quantization_config", None)
    quantization = settle_quantization(stored, quantization_config, param_dtype)
    base: Any = build_meta_model(config, param_dtype, trust_remote_code=trust_remote_code)
    base.config.quantization_config = quantization
    plans = plan_units(base)
    kinds = _shorten(base)
    whole = _pack(base, quantization, stored is not None, param_dtype)
    transients = _transient_bytes(base, param_dtype)
    lora = copy.deepcopy(peft_config)  # experts among its targets are noted in it
    lora = lora or LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=target_modules, task_type="CAUSAL_LM")
    check_peft_config(lora)
    weight = ModelWeight(config, inject_adapter(base, lora), [], param_dtype)
    _weigh_units(weight, plans, kinds, whole, transients)
    return weight


def _pack(base: Any, quantization: BitsAndBytesConfig, is_stored: bool, dtype: torch.dtype) -> set[nn.Parameter]:
    """Make a model on the meta device what it is once it is loaded. Returns what stays in float32."""
    quantizer = pack_linear_layers(base, quantization, is_stored, dtype, dtype)
    pack_expert_layers(base, quantization, quantizer.modules_to_not_convert, dtype, dtype)
    whole = float32_parameters(base, dtype)
    for parameter in whole:
        parameter.data = parameter.data.float()
    base.requires_grad_(False)
    base.hf_quantizer, base.is_loaded_in_4bit = quantizer, True
    return whole


def _transient_bytes(base: PreTrainedModel, dtype: torch.dtype) -> dict[int, int]:
    """Return for each parameter, by identity, what there is on the card beside it while it is made."""
    pieces = {target: piece for piece in draw_weights(base, dtype).pieces for target in piece.targets}
    return {id(value): pieces[name].transient_bytes // 2 for name, value in base.named_parameters() if name in pieces}


def _weigh_units(
    weight: ModelWeight,
    plans: list[Unit],
    kinds: dict[str, str],
    whole: set[nn.Parameter],
    transients: dict[int, int],
) -> None:
    """Weigh each unit of the full model: by the layer of the short one that it is like, and each of these once."""
    packed = dict(_packed_layouts(weight.short))
    seen: set[int] = set()
    weighed: dict[tuple[str, ...], UnitWeight] = {}
    for plan in plans:
        sources = tuple(kinds.get(name, name) for name in plan.modules)
        own = {id(p): p for name in sources for p in weight.base.get_submodule(name).parameters()}
        if sources not in weighed:
            parts = Parts(tuple(_describe(p, packed, p in whole, weight.param_dtype) for p in own.values()))
            sizes = [transients[key] for key in own if key in packed]
            kind = sources[0] if plan.is_decoder_layer else ""
            weighed[sources] = UnitWeight(plan, parts, kind, max(sizes, default=0))
            seen |= own.keys()
        weight.units.append(replace(weighed[sources], unit=plan))
        weight.num_packed += sum(packed[key][1] for key in own if key in packed)
    rest = [p for p in weight.short.parameters() if id(p) not in seen]
    if rest:
        parts = Parts(tuple(_describe(p, packed, p in whole, weight.param_dtype) for p in rest))
        weight.units.append(UnitWeight(Unit("", ()), parts))


def _shorten(base: Any) -> dict[str, str]:
    """Leave one decoder layer of each kind in a model. Returns for each layer the name of the one that is like it."""
    layers = decoder_layers(base)
    first: dict[Any, str] = {}
    kinds = {name: first.setdefault(_signature(layer), name) for name, layer in layers.items()}
    parents = {name.rpartition(".")[0] for name in layers}
    holder = base.get_submodule(next(iter(parents)))
    if len(parents) > 1 or not isinstance(holder, nn.ModuleList) or len(holder) != len(layers):
        return kinds
    kept = list(dict.fromkeys(kinds.values()))
    path, indices = next(iter(parents)), [int(name.rpartition(".")[2]) for name in kept]
    modules = [holder[index] for index in indices]
    owner, _, leaf = path.rpartition(".")
    setattr(base.get_submodule(owner), leaf, nn.ModuleList(modules))
    moved = {name: f"{path}.{position}" for position, name in enumerate(kept)}
    return {name: moved[like] for name, like in kinds.items()}


def _signature(layer: nn.Module) -> Any:
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    return type(layer), shapes


def _packed_layouts(model: nn.Module) -> Iterator[tuple[int, tuple[float, int]]]:
    """Yield packed parameters by identity, with the share of codes in their bytes and the weights they stand for."""
    for module in model.modules():
        if isinstance(module, PackedLinear4bit):
            layout = module.layout
            yield id(module.weight), (layout.codes_bytes / layout.num_bytes, layout.numel)
        elif isinstance(module, Experts4bit):
            for name, stack in module.layouts.items():
                share = stack.num_pieces * stack.piece.codes_bytes / stack.num_bytes
                yield id(getattr(module, name)), (share, stack.num_pieces * stack.piece.numel)


def _describe(parameter: nn.Parameter, packed: dict[int, tuple[float, int]], whole: bool, dtype: torch.dtype) -> Part:
    rows = parameter.shape[0] if parameter.ndim else 1
    row_bytes = parameter.nbytes // max(rows, 1)
    if id(parameter) in packed:
        return Part(rows, row_bytes, row_bytes, "packed", packed[id(parameter)][0])
    is_matrix = parameter.ndim > 1
    if parameter.requires_grad:
        return Part(rows, row_bytes, row_bytes * dtype.itemsize // 4, "trained", is_matrix=is_matrix)
    return Part(rows, row_bytes, row_bytes, "plain", is_matrix=is_matrix, is_whole=whole)

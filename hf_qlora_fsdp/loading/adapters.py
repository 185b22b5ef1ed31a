"""What is trained: LoRA weights in a model whose base is still on the meta device.

PEFT is given the model before a single weight exists, so each decoder layer can be read, fitted with its initialised
adapter and sharded before the next one is touched. PEFT puts adapters where their base layer is, on the meta device;
they come to life here, unit by unit, by PEFT's own initialisation. With the same seed set before, they are the weights
that `peft.get_peft_model` draws in one process, as long as all decoder layers are of one size: the loader takes the
largest units first, and PEFT goes from the first layer to the last.

**Experts.** Fused experts are adapted through PEFT's `target_parameters`, with layers of our own (`experts/lora.py`).
`target_modules="all-linear"` means what it says, experts included, although there is no linear layer among them any
more; the router, which was never quantised, stays frozen.

Two rules: trainable weights are **float32 masters** (FSDP casts them for the computation; an Adam step in bfloat16
loses half of all updates at a learning rate of 2e-5), and every rank starts from **rank 0's** values.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import ParamWrapper as StockParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..experts.layers import PROJECTIONS, Experts4bit, linear_routers
from ..experts.lora import ParamWrapper
from ..packed_linear import PackedLinear4bit
from ..ranks import log_once

_INITIALISATIONS_WITHOUT_BASE = (True, False, "gaussian")


def default_peft_config() -> LoraConfig:
    """Return what is trained when nothing was said: rank 16 on every linear layer but the head."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def check_peft_config(config: PeftConfig) -> None:
    """Refuse what cannot be initialised or trained on sharded 4-bit weights.

    Raises:
        ValueError: The config asks for such a thing.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"peft_config is a {type(config).__name__}, which is not initialised on a model that is still being read. "
            "Pass a peft.LoraConfig."
        )
    refused = {
        f"init_lora_weights={config.init_lora_weights!r}": (
            config.init_lora_weights not in _INITIALISATIONS_WITHOUT_BASE,
            "only those that need no 16-bit base weights, which no rank holds, are done while a model is read. Use "
            "True, False or 'gaussian'",
        ),
        "lm_head among its target_modules": (
            not isinstance(config.target_modules, str) and "lm_head" in (config.target_modules or ()),
            "TRL multiplies by the head's own weight, so its adapter would never be trained. Use "
            "modules_to_save=['lm_head']",
        ),
        f"target_parameters and lora_dropout={config.lora_dropout}": (
            bool(config.target_parameters and config.lora_dropout),
            "PEFT has no dropout for parameters, and would not load the adapter again. Use lora_dropout=0",
        ),
        "target_parameters and layers_to_transform": (
            bool(config.target_parameters and config.layers_to_transform is not None),
            "PEFT would adapt the parameters of all layers. Name those that are meant, such as "
            "target_parameters=['layers.0.mlp.experts.down_proj']",
        ),
        "layer_replication": (
            bool(config.layer_replication),
            "it repeats decoder layers that are read only once. Leave it out",
        ),
    }
    for what, (given, why) in refused.items():
        if given:
            raise ValueError(f"peft_config has {what}, but {why}.")


def inject_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap a model on the meta device in a `PeftModel`, with trainable weights in float32.

    Args:
        model (`PreTrainedModel`): The model, its 4-bit layers in place.
        config (`LoraConfig`): What to train.
    Raises:
        ValueError: Copies of tied weights would have to stay tied.
    """
    packed_experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts4bit)}
    asked = config.target_modules
    wants_all = bool(packed_experts) and str(asked).lower() == "all-linear"
    if packed_experts:
        _target_experts(model, config, packed_experts)
    with torch.random.fork_rng(devices=[]):  # PEFT draws weights here that are on the meta device a moment later
        peft_model = get_peft_model(model, config)
    _refuse_stock_wrappers(peft_model)
    _refuse_packed_copies(peft_model)
    if wants_all:
        _say_targets(peft_model, config, packed_experts)
    elif asked and not isinstance(asked, str):
        _say_unmatched(peft_model, config, set(asked), packed_experts)
    tied = sorted({name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair})
    for name in tied if config.ensure_weight_tying else ():
        if isinstance(model.get_submodule(name), ModulesToSaveWrapper | LoraLayer):
            raise ValueError(
                f"peft_config has ensure_weight_tying=True and trains {name!r}, one of the tied modules {tied}, but "
                "what is trained of each comes to life where it is read, and would not stay tied. Leave "
                "ensure_weight_tying out, which unties them, or use trainable_token_indices, whose rows stay tied."
            )
    masters: dict[int, nn.Parameter] = {}
    for module in peft_model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype != torch.float32:
                master = masters.setdefault(id(parameter), nn.Parameter(parameter.detach().float()))
                module.register_parameter(name, master)
    return peft_model


def _target_experts(model: PreTrainedModel, config: LoraConfig, packed_experts: dict[str, Experts4bit]) -> None:
    """Have PEFT put our LoRA on experts, and let "all-linear" mean them too."""
    config._register_custom_module({Experts4bit: ParamWrapper})
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    if config.lora_dropout:
        raise ValueError(
            f"peft_config has target_modules='all-linear' and lora_dropout={config.lora_dropout}, and the experts of "
            f"{type(model).__name__} are among the linear layers, for which PEFT has no dropout. Use lora_dropout=0, "
            "or name the modules to adapt, such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']."
        )
    head = model.get_output_embeddings()
    routers = set(linear_routers(model, packed_experts))
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in routers
    }
    linear = {name for name in linear if not _means_experts(name, model)}
    every = [f"{name}.{projection}" for name, experts in packed_experts.items() for projection in experts.layouts]
    # PEFT asks exclude_modules about modules alone.
    kept = [name for name in every if not _is_named(name.rpartition(".")[0], config.exclude_modules)]
    # By what all layers have in common, unless the experts of some are left out.
    targets = {".".join(name.split(".")[-3:]) for name in kept} if kept == every else set(kept)
    config.target_modules, config.target_parameters = linear, sorted(targets) or None


def _means_experts(name: str, model: PreTrainedModel) -> bool:
    """Return whether PEFT takes the name of a layer for that of a projection of experts, and gives it twice the rank.

    It does so where experts had layers of that name before they were fused, for the layers of that name that there are
    beside them too: in layers that are dense, and as shared experts.
    """
    alone = LoraConfig(target_modules={name})
    try:
        convert_peft_config_for_transformers(alone, model, None)
    except ValueError:  # one of two that were fused, gate_proj without up_proj
        return True
    return name not in (alone.target_modules or ())


def _is_named(name: str, given: str | Collection[str] | None) -> bool:
    """Return whether a module is among those that a field of PEFT's config gives: a pattern, or ends of names."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in given or ())


def _say_unmatched(model: PeftModel, config: LoraConfig, asked: set[str], packed_experts: Collection[str]) -> None:
    """Say which of the modules to adapt are not there, which PEFT tells only if none is."""
    base = model.get_base_model()
    # What experts were called before they were fused, PEFT has moved to target_parameters by now.
    left = sorted(asked & set(config.target_modules or ()))
    unmatched = [name for name in left if not any(_is_named(module, [name]) for module, _ in base.named_modules())]
    if unmatched:
        experts = (
            " Its experts are adapted with target_modules='all-linear', or with target_parameters="
            f"{[f'mlp.experts.{name}' for name in PROJECTIONS]}."
        )
        log_once(
            "target_modules has %s, of which %s has none: nothing is adapted in their place.%s",
            ", ".join(unmatched),
            type(base).__name__,
            experts if packed_experts else "",
        )


def _say_targets(model: PeftModel, config: LoraConfig, packed_experts: Collection[str]) -> None:
    """Say what "all-linear" has come to mean.

    PEFT takes the names of projections that are in experts as well for those of the experts alone, whatever the
    config says (`_convert_peft_config_moe`), and leaves dense layers and shared experts beside them out.
    """
    adapted, left_out = set(), set()
    base = model.get_base_model()
    head, routers = base.get_output_embeddings(), set(linear_routers(base, packed_experts))
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(inside) or name in routers or _is_named(name, config.exclude_modules):
            continue
        if isinstance(module, LoraLayer):
            inside += (f"{name}.",)
            adapted.add(re.sub(r"^.*\.\d+\.", "", name))
        elif isinstance(module, nn.Linear) and module is not head:
            left_out.add(re.sub(r"^.*\.\d+\.", "", name))
    log_once(
        "target_modules='all-linear': LoRA on %s%s. Routers stay as they are%s%s.",
        ", ".join(sorted(adapted)),
        ", each expert's included" if config.target_parameters else "",
        f", and so do {', '.join(sorted(left_out))}, which PEFT cannot tell from experts" if left_out else "",
        f"; exclude_modules={config.exclude_modules!r} too" if config.exclude_modules else "",
    )


def _refuse_stock_wrappers(model: PeftModel) -> None:
    """Refuse parameters that PEFT would replace by their sum with the adapter: FSDP does not shard what it makes."""
    for name, module in model.named_modules():
        if isinstance(module, StockParamWrapper) and not isinstance(module, ParamWrapper):
            raise ValueError(
                f"peft_config adapts {module.parameter_name!r} of {name!r} through target_parameters, which is done "
                "for experts in 4 bits only. Use target_modules for linear layers, and modules_to_save for a router, "
                "which is then trained whole."
            )


def _refuse_packed_copies(model: PeftModel) -> None:
    """Refuse to train 4-bit weights whole: the copy would be the bytes of their codes, taken for numbers."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(
            isinstance(part, PackedLinear4bit | Experts4bit) for part in module.original_module.modules()
        ):
            raise ValueError(
                f"peft_config has modules_to_save={sorted(model.peft_config[model.active_adapter].modules_to_save)}, "
                f"which trains {name!r} whole, but its weights are in 4 bits, of which there is no gradient. Name what "
                "is in 16 bits, such as the head, the embedding, norms or a router, and adapt the rest with LoRA; or "
                "leave it in 16 bits, by llm_int8_skip_modules in quantization_config."
            )


def initialize_adapter(module: nn.Module, config: LoraConfig, device: torch.device) -> None:
    """Bring the adapter weights inside a module from the meta device to life.

    A collective: rank 0's values are sent to all. The base weights in the module must be in place.

    Args:
        module (`nn.Module`): A part of the model.
        config (`LoraConfig`): How to initialise.
        device (`torch.device`): Where the weights shall live.
    """
    for child in module.modules():
        if isinstance(child, LoraLayer):
            _initialize_lora(child, config, device)
        elif isinstance(child, ModulesToSaveWrapper):
            _initialize_copies(child, device)
        elif isinstance(child, TrainableTokensLayer) and child.tied_adapter is None:
            _initialize_rows(child, device)
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor) and dist.get_world_size() > 1:
            dist.broadcast(parameter.data, src=0)


def _initialize_lora(layer: LoraLayer, config: LoraConfig, device: torch.device) -> None:
    parts = [part for parts in (layer.lora_A, layer.lora_B) for part in parts.values()]
    tables = [tables for tables in (layer.lora_embedding_A, layer.lora_embedding_B) if len(tables)]
    if not any(parameter.device.type == "meta" for part in [*parts, *tables] for parameter in part.parameters()):
        return
    # On the host first: the same seed then gives the same adapter on every kind of device.
    for part in [*parts, *tables]:
        part.to_empty(device="cpu")
    for part in parts:
        part.reset_parameters()  # what init_lora_weights=False leaves in place
    for adapter_name in layer.r:
        layer.reset_lora_parameters(adapter_name, config.init_lora_weights)
    for part in [*parts, *tables]:
        part.to(device)
    for adapter_name, dora in layer.lora_magnitude_vector.items():
        # DoRA's magnitudes are the norms of the base weight's rows, which are whole here and nowhere else.
        lora_a, lora_b = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        scaling = layer.scaling[adapter_name]
        dora.update_layer(base_layer=layer.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=scaling)
        dora.weight = nn.Parameter(dora.weight.detach().float())


def _initialize_rows(layer: TrainableTokensLayer, device: torch.device) -> None:
    """Copy the rows of the embedding that are trained (`trainable_token_indices`)."""
    weight = layer.get_base_layer().weight.detach()
    for adapter_name, indices in layer.token_indices.items():
        if layer.trainable_tokens_delta[adapter_name].device.type == "meta":
            rows = weight[torch.tensor(indices, device=weight.device)].to(device)
            layer.trainable_tokens_delta[adapter_name] = nn.Parameter(rows.float())
            layer.trainable_tokens_original[adapter_name] = rows.clone()


def _initialize_copies(wrapper: ModulesToSaveWrapper, device: torch.device) -> None:
    """Copy the weights of modules that are trained whole (`modules_to_save`)."""
    originals = dict(wrapper.original_module.named_parameters())
    for copy in wrapper.modules_to_save.values():
        for name, parameter in list(copy.named_parameters()):
            if parameter.device.type == "meta":
                path, _, leaf = name.rpartition(".")
                value = originals[name].detach().to(device, torch.float32, copy=True)
                copy.get_submodule(path).register_parameter(leaf, nn.Parameter(value))

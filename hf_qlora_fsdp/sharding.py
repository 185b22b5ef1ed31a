"""Cutting a model across ranks with FSDP2, and proving that it was done.

PyTorch's `fully_shard` shards parameter by parameter along dimension 0, so packed 4-bit weights, bfloat16 norms and
float32 LoRA masters live in one unit. What this module adds is the choice of units (`anatomy.plan_units`), and three
rules that keep the numbers right:

* **Mixed precision is a policy of the unit.** Parameters are gathered in `param_dtype`; gradients are reduced in
  float32; outputs are not cast, so that losses and log-probabilities are not rounded to bfloat16.
* **Storage dtype equals `param_dtype`.** FSDP casts before it gathers. Packed bytes viewed in another floating dtype
  would be cast as numbers, without an error. `check_storage_dtype` refuses such a pair before a byte is read.
* **What a model insists on keeping in float32** stays whole on every rank: such parameters are few and small, and a
  unit has only one dtype.

**Offload.** Frozen matrices of offloaded units lie in host memory (`offloading/offload.py`) and are copied to the
accelerator when their unit is gathered. What is trained stays on the accelerator, with its gradients and optimizer
states: it is small, and an optimizer step on the host would wait for copies both ways. `cpu_offload_trainable` moves
it, too, by PyTorch's `CPUOffloadPolicy`; the LoRA weights of a layer then form a unit of their own, since a policy
holds for a whole unit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .anatomy import Unit, decoder_layers, keep_in_float32
from .errors import ShardingError
from .experts.layers import fused_experts
from .mesh import make_mesh, mesh_device
from .offloading.offload import HostStore, HostTensor, shard_bytes
from .packed_linear import PackedLinear4bit, repack
from .ranks import fail_together, join_process_group, log_once
from .sharding_policy import ReadyUnits, ShardingPolicy
from .units import format_bytes, format_dtype


def check_storage_dtype(storage_dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """Refuse a storage dtype that FSDP would cast as numbers.

    Raises:
        ValueError: Both differ and the storage is floating.
    """
    if storage_dtype.is_floating_point and storage_dtype != param_dtype:
        raise ValueError(
            f"bnb_4bit_quant_storage={format_dtype(storage_dtype)} with param_dtype={format_dtype(param_dtype)}: "
            "FSDP would cast the packed 4-bit bytes as numbers and train on garbage. Leave bnb_4bit_quant_storage out; "
            f"it follows the parameter dtype. Or train in {format_dtype(storage_dtype)}."
        )


def shard_unit(
    model: PreTrainedModel,
    unit: Unit,
    policy: ShardingPolicy,
    mesh: DeviceMesh,
    ignored: set[nn.Parameter],
    store: HostStore | None = None,
) -> None:
    """Make a unit of the model, whose weights are whole and on the device, one FSDP unit.

    Args:
        model (`PreTrainedModel`): The base model, with or without adapters in it.
        unit (`Unit`): Its part.
        policy (`ShardingPolicy`): How to cut.
        mesh (`DeviceMesh`): The ranks.
        ignored (`set[nn.Parameter]`): Parameters that stay whole.
        store (`HostStore`, *optional*): Where its frozen matrices shall lie, if it is offloaded.
    """
    modules = [model.get_submodule(name) for name in unit.modules]
    changes: dict[str, Any] = {}
    if policy.cpu_offload_trainable:
        shard_adapters(modules, policy, mesh)
        if _trained(modules):  # modules_to_save: what is frozen beside them, a norm, goes the same way
            changes["offload_policy"] = policy.trainable_offload(mesh)
            store = None
    if store is not None:
        offload_matrices(modules, ignored, store)
    if unit.is_replicated:
        ignored = ignored | _frozen(modules)
        changes["reshard_after_forward"] = False  # adapters alone are next to nothing
    if unit.keep_gathered:
        changes["reshard_after_forward"] = False
        logging.getLogger("torch.distributed.fsdp.fully_shard").addFilter(_UNRUN_HEAD)
    looked_up_alone = all(type(module) is nn.Embedding for module in modules)  # FSDP changes the classes
    policy.fully_shard(modules if len(modules) > 1 else modules[0], mesh, ignored, **changes)
    if looked_up_alone:  # by its indices alone, its gradient is made; FSDP would gather it behind the first layer
        cast(FSDPModule, modules[0]).set_unshard_in_backward(False)
    if store is not None:
        store.memory.seal()
    label_packed(modules)


def offload_matrices(modules: Iterable[nn.Module], ignored: set[nn.Parameter], store: HostStore) -> None:
    """Make the frozen matrices of a unit go to host memory when they are sharded. Vectors, norms say, are too small."""
    places = [
        (child, name, parameter)
        for module in modules
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if parameter is not None and parameter.ndim > 1 and not parameter.requires_grad and parameter not in ignored
    ]
    whole = {parameter: parameter.data for _, _, parameter in places}  # a tied weight is one
    unit = store.add_unit(sum(shard_bytes(weight, dist.get_world_size()) for weight in whole.values()))
    offloaded = {
        parameter: nn.Parameter(HostTensor(weight, unit), requires_grad=False) for parameter, weight in whole.items()
    }
    for child, name, parameter in places:
        child._parameters[name] = offloaded[parameter]


def _frozen(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters() if not parameter.requires_grad}


def _trained(modules: Iterable[nn.Module]) -> bool:
    """Return whether something is trained that no other unit holds."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return any(parameter.requires_grad and not isinstance(parameter, DTensor) for parameter in parameters)


def shard_adapters(modules: Iterable[nn.Module], policy: ShardingPolicy, mesh: DeviceMesh) -> None:
    """Make the LoRA layers in `modules` an FSDP unit of their own.

    Modules that are trained whole (`modules_to_save`) stay in their unit: TRL reads a trained head without running it,
    so in a unit of its own nobody would reduce its gradient.
    """
    layers = [part for module in modules for child in module.modules() for part in _lora_parts(child)]
    if layers:
        policy.fully_shard(layers, mesh, set(), offload_policy=policy.trainable_offload(mesh))


def shard_root(root: nn.Module, policy: ShardingPolicy, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    """Make the outermost module the FSDP root, which holds what no unit took, and drives the units."""
    policy.fully_shard(root, mesh, ignored, reshard_after_forward=None)
    if hasattr(root, "generate"):  # it runs the model inside the root, past the root's own hooks
        register_fsdp_forward_method(root, "generate")


def label_packed(modules: Iterable[nn.Module]) -> None:
    """Label the packed weights anew: FSDP puts other `Parameter` objects in the place of the labelled ones."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, PackedLinear4bit):
                child.label_weight()


def float32_parameters(model: PreTrainedModel, dtype: torch.dtype, modules: Iterable[str] = ("",)) -> set[nn.Parameter]:
    """Return the parameters that the model insists on keeping in float32, of all or of some of its modules."""
    parts = keep_in_float32(model, dtype)
    found: set[nn.Parameter] = set()
    for path in modules if parts else ():
        for name, parameter in model.get_submodule(path).named_parameters(prefix=path):
            if any(part in name for part in parts):
                found.add(parameter)
    return found


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers, which FSDP leaves alone, to the device. Their dtype is kept: rotary frequencies are float32."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model, or the model inside a `PeftModel`, is already in FSDP units."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_sharded(model: nn.Module, policy: ShardingPolicy) -> None:
    """Check that sharding was done: every decoder layer is in a unit, and each rank holds its share of every weight, or
    all of what is frozen in a replicated layer.

    Args:
        model (`nn.Module`): The root, possibly a `PeftModel`.
        policy (`ShardingPolicy`): How it should have been cut.
    Raises:
        ShardingError: It was not.
    """
    base = base_model(model)
    unwrapped = [
        name for name, layer in decoder_layers(base, policy.class_names).items() if not isinstance(layer, FSDPModule)
    ]
    if unwrapped or not isinstance(model, FSDPModule):
        raise ShardingError(f"These modules should be FSDP units and are not: {unwrapped or [type(model).__name__]}.")
    ignored = float32_parameters(base, policy.param_dtype)
    replicated = [name for unit in policy.plan_units(base) if unit.is_replicated for name in unit.modules]
    whole = _frozen(map(base.get_submodule, replicated))
    for name, parameter in model.named_parameters():
        if parameter in ignored:
            continue
        if isinstance(parameter, DTensor) == (parameter in whole):
            how = "cut" if parameter in whole else "whole on every rank"
            raise ShardingError(
                f"{name} ({format_bytes(parameter.nbytes)}) is {how}, and with replicate_layers="
                f"{policy.replicate_layers!r} it should not be. Give a model that was sharded before the same "
                "replicate_layers as it was loaded with."
            )
        num_rows = parameter.shape[0] if parameter.ndim else 0
        most = -(-num_rows // dist.get_world_size())
        if isinstance(parameter, DTensor) and parameter.to_local().shape[0] > most:
            raise ShardingError(f"Rank {dist.get_rank()} holds more than its share of {name}.")


def shard_again(model: nn.Module) -> None:
    """Have every unit show its shards. After a forward without a backward, those that are kept until then show whole
    weights, rounded to the parameter dtype: the head's always, all of them with `reshard_after_forward=False`.

    Args:
        model (`nn.Module`): The model, sharded or not, between two steps.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def base_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shard_model(model: nn.Module, policy: ShardingPolicy, device: torch.device | None = None) -> nn.Module:
    """Shard a quantised model that is already in memory, in place, unit by unit.

    `load_quantized_model` needs a fraction of the memory, since no rank ever holds the whole model. This is for
    models that a script has loaded by itself. Packed bytes are viewed in another dtype, never quantised again.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Quantised by bitsandbytes to 4 bits, with any storage dtype, on the
            host or on this rank's device.
        policy (`ShardingPolicy`): How to cut.
        device (`torch.device`, *optional*): This rank's device.
    Returns:
        The same model, now an `FSDPModule`.
    Raises:
        ValueError: The model is not in 4 bits.
    """
    base = base_model(model)
    _check_quantized(base)
    join_process_group("cuda" if torch.cuda.is_available() else "cpu")
    mesh = make_mesh()
    device = device or mesh_device(mesh)
    ignored = float32_parameters(base, policy.param_dtype)
    unpacked = [name for name, module in model.named_modules() if _is_unpacked(module)]
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    cast: Counter[torch.dtype] = Counter()
    for name in unpacked:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        packed = repack(linear, compute_dtype=policy.param_dtype, storage_dtype=policy.param_dtype)
        setattr(model.get_submodule(parent), leaf, packed)
        linear._parameters.clear()  # the weight refers to the layer, and would stay until garbage is collected
    units = policy.plan_units(base)
    with fail_together("making room for offloaded shards"):
        store = policy.make_store(device)
    offloaded, ready = policy.offloaded_units(units), ReadyUnits(units)
    for unit in units:
        for name in unit.modules:
            cast += _move(base.get_submodule(name), device, policy.param_dtype, ignored)
        if (joined := ready.add(unit)) is None:
            continue
        with fail_together(f"sharding {joined.name}"):  # one rank's disk may be full
            shard_unit(base, joined, policy, mesh, ignored, store if unit.name in offloaded else None)
    if store is not None:
        with fail_together("finishing the files of offloaded shards"):
            store.memory.finish()
    cast += _move(model, device, policy.param_dtype, ignored)
    shard_root(model, policy, mesh, ignored)
    move_buffers(model, device)
    base.__dict__.pop("hf_device_map", None)
    log_once(
        "The model was loaded whole by every rank (%s each) and is now sharded in place. Pass its name or folder "
        "instead of the model and no rank holds more than its share: %s less at the peak.",
        format_bytes(total_bytes),
        format_bytes(total_bytes * (1 - 1 / dist.get_world_size())),
    )
    for dtype, count in cast.items():
        log_once(
            "%d frozen tensors were cast from %s to %s.", count, format_dtype(dtype), format_dtype(policy.param_dtype)
        )
    return model


def check_in_4_bits(base: nn.Module, is_in_4_bits: bool) -> None:
    """Refuse a model that a script has loaded in another way than in 4 bits.

    Args:
        base (`PreTrainedModel`): The model.
        is_in_4_bits (`bool`): What is known of it.
    Raises:
        ValueError: It is not in 4 bits.
    """
    if not is_in_4_bits:
        kind = "in 8 bits" if getattr(base, "is_loaded_in_8bit", False) else "not quantised"
        raise ValueError(
            f"The {type(base).__name__} passed as model is {kind}, and only LoRA on 4-bit weights is trained here. "
            "Pass its name or folder as model, which is quantised while it is read, or load it with "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)."
        )


def _check_quantized(base: nn.Module) -> None:
    check_in_4_bits(base, any(isinstance(module, Linear4bit) for module in base.modules()))
    unquantized = list(fused_experts(base))
    if unquantized:
        num_bytes = sum(weight.nbytes for _, module in unquantized for weight in module.parameters(recurse=False))
        raise ValueError(
            f"The {type(base).__name__} passed as model holds its experts ({unquantized[0][0]!r} and so on) in 16 "
            f"bits, {format_bytes(num_bytes)} of them: bitsandbytes leaves fused experts alone. Pass its name or "
            "folder as model, and they are quantised while they are read."
        )


def _move(
    module: nn.Module, device: torch.device, dtype: torch.dtype, ignored: set[nn.Parameter]
) -> Counter[torch.dtype]:
    """Put the parameters that are not sharded yet on the device: trainable ones in float32, frozen ones in `dtype`."""
    cast: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            continue
        target = torch.float32 if parameter.requires_grad or parameter in ignored else dtype
        if not parameter.requires_grad and parameter.dtype != target:
            cast[parameter.dtype] += 1
        parameter.data = parameter.data.to(device, target)
    return cast


def _lora_parts(module: nn.Module) -> list[nn.Module]:
    """Return the trained modules that a LoRA layer runs. A unit is gathered when its modules run."""
    if not isinstance(module, LoraLayer):
        return []
    groups = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    parts = [part for group in groups for part in group.values()]
    return [part for part in parts if all(parameter.requires_grad for parameter in part.parameters())]


class _UnrunHeadFilter(logging.Filter):
    """Drops the warning of torch before 2.13 that the head "did not run forward before backward".

    TRL reads the head's weight without running the head. Its unit is gathered when the norm runs, and torch reduces
    its gradients at the end of the backward: `test_gradient_of_a_trained_head_is_reduced`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "did not run forward before backward" not in record.getMessage()


_UNRUN_HEAD = _UnrunHeadFilter()


def _is_unpacked(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit) and not isinstance(module, PackedLinear4bit)

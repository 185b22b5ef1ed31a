"""How a model is cut: in which dtype, how often it is gathered, and where its frozen weights lie in between.

The arguments of a run become a `ShardingPolicy` (`inputs.read_policy`), and everything that shards takes one.

**Layers that stay whole.** Frozen weights never change, so a rank that has room for those of a layer need not be told
them twice a step. `replicate_layers` leaves them on every rank and cuts what is trained, with its gradients and
optimizer states. A layer then takes the bytes of its 4-bit weights that others would have held, and gathers its
adapter alone, together with those of the next such layers: one after the other they are too small to be worth the
Python. With few tokens at a time, where a step is mostly that Python, this is what takes it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from .anatomy import Unit, plan_units
from .offloading.host_memory import HostMemory, KeptFile, MappedFile, PinnedMemory
from .offloading.offload import HostStore

ADAPTERS_AT_ONCE = 8
"""Replicated layers whose adapters are gathered together. All of an 8B on two H200s, two rows each: steps of 0.356 s
with 8 and of 0.37 to 0.44 s one by one; eight rows each: 1.284 s with 8 and 1.293 s with 4."""


@dataclass(frozen=True)
class ShardingPolicy:
    """How a model is cut.

    Args:
        param_dtype (`torch.dtype`): Dtype of the computation, in which parameters are gathered.
        reshard_after_forward (`bool`): Free a layer after its forward and gather it again for its backward. Without
            it, every layer stays gathered in between: faster, and as large as the whole 4-bit model.
        cpu_offload (`bool`): Keep the frozen shards in host memory.
        cpu_offload_pin_memory (`bool`): Pin them. Pinned memory is copied at once, and cannot be swapped out.
        cpu_offload_layers (`int`, *optional*): Offload so many decoder layers, spread evenly, and nothing else.
        cpu_offload_dir (`Path`, *optional*): Folder for the shards, in files that are mapped into memory.
        cpu_offload_keep_files (`bool`): Leave these files for the next run.
        cpu_offload_trainable (`bool`): Keep what is trained in host memory, too.
        replicate_layers (`int` or `"all"`, *optional*): Leave what is frozen in so many decoder layers, spread evenly,
            whole on every rank.
        transformer_layer_cls_to_wrap (`tuple[str, ...]`, *optional*): Decoder layer classes. Found from the model by
            default.
    """

    param_dtype: torch.dtype = torch.bfloat16
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    cpu_offload_pin_memory: bool = True
    cpu_offload_layers: int | None = None
    cpu_offload_dir: Path | None = None
    cpu_offload_keep_files: bool = False
    cpu_offload_trainable: bool = False
    replicate_layers: int | str | None = None
    transformer_layer_cls_to_wrap: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.replicate_layers is not None and (self.cpu_offload or self.cpu_offload_trainable):
            raise ValueError(
                f"replicate_layers={self.replicate_layers!r} with offloading: one spends device memory to save time, "
                "the other time to save device memory. Leave one of the two out."
            )

    @property
    def class_names(self) -> list[str] | None:
        return list(self.transformer_layer_cls_to_wrap) if self.transformer_layer_cls_to_wrap else None

    def plan_units(self, model: PreTrainedModel) -> list[Unit]:
        """Cut a model into units, in the order of its forward, and say of each decoder layer whether it stays whole."""
        units = plan_units(model, self.class_names)
        replicated = self.replicated_units(units)
        return [replace(unit, is_replicated=unit.name in replicated) for unit in units]

    def fully_shard(self, module: Any, mesh: DeviceMesh, ignored: set[nn.Parameter], **changes: Any) -> None:
        """Call `torch.distributed.fsdp.fully_shard` on a module or a list of modules with this policy."""
        modules = module if isinstance(module, list) else [module]
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=torch.float32),
            "reshard_after_forward": self.reshard_after_forward,
            "ignored_params": ignored,
        }
        fully_shard(module, **(options | changes))
        for part in modules:  # behind FSDP's own hook, which runs first
            part.register_forward_pre_hook(_free_gathered)

    def pins_memory(self, device_type: str) -> bool:
        """Return whether offloaded shards are pinned, which is something that memory is for an accelerator."""
        return self.cpu_offload_pin_memory and self.cpu_offload_dir is None and device_type != "cpu"

    def trainable_offload(self, mesh: DeviceMesh) -> OffloadPolicy:
        """Return PyTorch's policy for what is trained."""
        if not self.cpu_offload_trainable:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.cpu_offload_pin_memory and mesh.device_type != "cpu")

    def offloaded_units(self, units: Sequence[Unit]) -> set[str]:
        """Return the names of the units whose frozen weights are offloaded."""
        if not self.cpu_offload:
            return set()
        if self.cpu_offload_layers is None:
            return {unit.name for unit in units}
        layers = [unit.name for unit in units if unit.is_decoder_layer]
        return {layers[index] for index in spread(self.cpu_offload_layers, len(layers))}

    def replicated_units(self, units: Sequence[Unit]) -> set[str]:
        """Return the names of the units, of a layer each, that are left whole on every rank."""
        if self.replicate_layers is None:
            return set()
        layers = [unit.name for unit in units if unit.is_decoder_layer]
        if self.replicate_layers == "all":
            return set(layers)
        return {layers[index] for index in spread(int(self.replicate_layers), len(layers), "replicate_layers")}

    def describe_offload(self, device_type: str) -> str:
        """Say in words what lies where."""
        if not self.cpu_offload:
            frozen = ""
        else:
            which = "frozen weights" if self.cpu_offload_layers is None else f"{self.cpu_offload_layers} decoder layers"
            where = f"{'pinned' if self.pins_memory(device_type) else 'pageable'} host memory"
            frozen = f"{which} in {where if self.cpu_offload_dir is None else f'files in {self.cpu_offload_dir}'}"
        trained = "what is trained in host memory" if self.cpu_offload_trainable else ""
        return ", ".join(part for part in (frozen, trained) if part) or "none"

    def make_store(self, device: torch.device) -> HostStore | None:
        """Return the place in host memory for a model's offloaded shards, `None` without offloading."""
        if not self.cpu_offload:
            return None
        if self.cpu_offload_dir is not None:
            kind = KeptFile if self.cpu_offload_keep_files else MappedFile
            return HostStore(kind(self.cpu_offload_dir), device)
        return HostStore(PinnedMemory() if self.pins_memory(device.type) else HostMemory(), device)


def _free_gathered(module: Any, args: Any) -> None:
    """Free the buffer that a unit was gathered into, once it was copied into its parameters.

    In the forward, FSDP keeps it until the next unit is there, so that gathering that one need not wait for this one's
    copy: two units lie in buffers then, beside the one that computes. For layers in 4 bits the copy takes a twentieth
    of a layer's forward, and the second buffer is the size of the largest unit, 4.2 GB for the head of a 405B model. So
    it is freed as FSDP itself does in the backward: the next gather, which may get the same memory, waits for the copy.

    Source:
        `FSDPParamGroup.wait_for_unshard` in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py.
    """
    communication = module._get_fsdp_state()._comm_ctx
    if (held := communication.all_gather_state) is not None:
        communication.all_gather_copy_in_stream.wait_event(held.event)
        communication.all_gather_stream.wait_event(held.event)
        communication.all_gather_state = None


class ReadyUnits:
    """Joins replicated layers into units, as they become ready in whatever order.

    Args:
        units (`Sequence[Unit]`): All units, in the order of the forward.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        chosen = [unit for unit in units if unit.is_replicated]
        groups = [chosen[start : start + ADAPTERS_AT_ONCE] for start in range(0, len(chosen), ADAPTERS_AT_ONCE)]
        self.joined = {unit.name: _join(group) for group in groups for unit in group}
        self.ready: set[str] = set()

    def add(self, unit: Unit) -> Unit | None:
        """Return the unit that can be sharded now that this one is ready, `None` if it waits for others."""
        if not unit.is_replicated:
            return unit
        self.ready.add(unit.name)
        joined = self.joined[unit.name]
        return joined if self.ready.issuperset(joined.modules) else None


def _join(units: Sequence[Unit]) -> Unit:
    first, *others = units
    name = f"{first.name} and {len(others)} more" if others else first.name
    return replace(first, name=name, modules=tuple(name for unit in units for name in unit.modules))


def spread(count: int, total: int, option: str = "cpu_offload_layers") -> list[int]:
    """Return `count` of the indices below `total`, as evenly spaced as can be: `spread(2, 6)` is `[2, 5]`.

    Transfers then have the computation of the layers between them to hide behind.

    Raises:
        ValueError: There are not so many. Names the option that says how many.
    """
    if count > total:
        otherwise = 'or "all"' if option == "replicate_layers" else "or leave it out, which offloads everything"
        raise ValueError(
            f"{option}={count}, but the model has {total} decoder layers. Write a number up to {total}, {otherwise}."
        )
    return [index for index in range(total) if (index + 1) * count // total > index * count // total]

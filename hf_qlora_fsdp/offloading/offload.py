"""Frozen shards in host memory, gathered on the accelerator.

FSDP asks a shard that has a method `fsdp_pre_all_gather` for what shall be gathered. A `HostTensor` is such a shard:
its bytes lie in host memory (`host_memory.py`), and it answers with a copy on the accelerator, made on FSDP's copy
stream, one unit ahead of the computation. What is trained in the same unit is an ordinary shard and stays where the
computation is, with its gradients and optimizer states.

    whole weight on the accelerator, as a HostTensor
        -> fully_shard cuts it, and asks for room for a shard (new_zeros): a region of host memory
        -> copies its part there; the whole weight is freed
    later, for each gather
        -> fsdp_pre_all_gather: region -> accelerator; pinned memory at once, other memory through `staging.py`

`CPUOffloadPolicy` does the first half, for all parameters of a unit alike and in pinned memory or plain memory only,
from which it copies at less than half the speed.

Source:
    The extension points: torch/distributed/fsdp/_fully_shard/_fsdp_param.py (`_init_extensions`, `all_gather_inputs`),
    https://github.com/pytorch/pytorch/issues/122634.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from .host_memory import HostMemory, PinnedMemory
from .staging import StagingRing, choose_slot_bytes

ALIGNMENT = 512

_aten = torch.ops.aten
_VIEWS = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.view.default,
}


class HostShard:
    """A rank's part of one weight, padded as FSDP pads it: a stretch of its unit's region.

    Args:
        unit (`HostUnit`): The unit it is gathered with.
        start (`int`): Where in the region it begins.
        shape (`tuple[int, ...]`): Shape of the padded part.
        dtype (`torch.dtype`): Its dtype.
    """

    def __init__(self, unit: HostUnit, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.unit, self.start, self.shape, self.dtype = unit, start, shape, dtype
        self.num_bytes = torch.Size(shape).numel() * dtype.itemsize

    def cut(self, region: torch.Tensor) -> torch.Tensor:
        """Return it out of the unit's region, or out of a copy of that."""
        return region[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)

    def fill(self, content: torch.Tensor) -> None:
        """Write its first rows; FSDP pads what is short with zeros, which a new region holds."""
        raw = content.detach().to(self.dtype).contiguous().view(-1).view(torch.uint8)
        stretch = self.unit.region[self.start : self.start + raw.numel()]
        self.unit.store.memory.fill(stretch, raw)


class HostUnit:
    """The shards that are gathered together, side by side in one region of host memory.

    Args:
        store (`HostStore`): Where it belongs.
        num_bytes (`int`): Room for all of them, see `padded_bytes`.
    """

    def __init__(self, store: HostStore, num_bytes: int) -> None:
        self.store = store
        self.region = store.memory.allocate(num_bytes)
        self.shards: list[HostShard] = []
        self._sent: dict[HostShard, torch.Tensor] = {}

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostShard:
        """Return the next shard."""
        start = sum(padded_bytes(shard.num_bytes) for shard in self.shards)
        self.shards.append(HostShard(self, start, shape, dtype))
        assert start + self.shards[-1].num_bytes <= self.region.numel()
        return self.shards[-1]

    def send(self, shard: HostShard) -> torch.Tensor:
        """Return a shard on the device, in stream order. The first one that is asked for brings the others along."""
        if shard not in self._sent:
            region = self.store.fetch(self)
            self._sent = {other: other.cut(region) for other in self.shards}
        return self._sent.pop(shard)  # once it has been gathered, nobody holds it


class HostStore:
    """All of a model's offloaded shards on this rank.

    Args:
        memory (`HostMemory`): Where they lie.
        device (`torch.device`): Where they are gathered.
    """

    def __init__(self, memory: HostMemory, device: torch.device) -> None:
        self.memory, self.device = memory, device
        self.units: list[HostUnit] = []
        self._ring: StagingRing | None = None

    def add_unit(self, num_bytes: int) -> HostUnit:
        """Return a new unit, to which the next weights belong."""
        self.units.append(HostUnit(self, num_bytes))
        return self.units[-1]

    def fetch(self, unit: HostUnit) -> torch.Tensor:
        """Return a unit's region on the device, valid for what the current stream does from now on."""
        if isinstance(self.memory, PinnedMemory):
            return unit.region.to(self.device, non_blocking=True)
        if self._ring is None:
            self._ring = StagingRing(self.device, choose_slot_bytes(unit.region.numel() for unit in self.units))
        return self._ring.fetch(unit)


def padded_bytes(num_bytes: int) -> int:
    """Return what a shard takes of a region, so that the next one is aligned."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def shard_bytes(weight: torch.Tensor, num_ranks: int) -> int:
    """Return what a weight's padded shard takes of a region."""
    num_rows = -(-weight.shape[0] // num_ranks)
    return padded_bytes(num_rows * weight[:1].numel() * weight.itemsize)


class HostTensor(torch.Tensor):
    """A weight, or a shard of it, that is kept in host memory.

    To everything but FSDP it is an ordinary tensor where its bytes are. Room for a shard of it is made in host memory.
    """

    data_: torch.Tensor
    unit: HostUnit
    shard: HostShard | None

    @staticmethod
    def __new__(cls, data: torch.Tensor, unit: HostUnit, shard: HostShard | None = None) -> HostTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=data.device,
        )

    def __init__(self, data: torch.Tensor, unit: HostUnit, shard: HostShard | None = None) -> None:
        self.data_, self.unit, self.shard = data, unit, shard

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HostTensor({self.data_!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first = args[0]
        if func is _aten.new_zeros.default:
            return first._make_room(tuple(args[1]))
        if func is _aten.copy_.default and isinstance(first, HostTensor):
            return first._fill(args[1])
        bare_args, bare_kwargs = pytree.tree_map_only(HostTensor, lambda tensor: tensor.data_, (args, kwargs or {}))
        result = func(*bare_args, **bare_kwargs)
        if func not in _VIEWS:
            return result
        return pytree.tree_map_only(torch.Tensor, lambda view: HostTensor(view, first.unit, first.shard), result)

    def _make_room(self, shape: tuple[int, ...]) -> HostTensor:
        """Return a padded shard, to be filled. FSDP pads a shard again when it first runs; it stands padded already."""
        shard = self.shard
        if shard is None or shard.shape != shape:
            shard = self.unit.add(shape, self.dtype)
        return HostTensor(shard.cut(self.unit.region), self.unit, shard)

    def _fill(self, content: torch.Tensor) -> HostTensor:
        assert self.shard is not None, "only shards are written"
        if not (isinstance(content, HostTensor) and content.shard is self.shard):
            self.shard.fill(content.data_ if isinstance(content, HostTensor) else content)
        return self

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], None]:
        """Return the padded shard on the accelerator."""
        assert self.shard is not None
        shard = self.unit.send(self.shard)
        return (shard.to(mp_policy.param_dtype or shard.dtype),), None

    def fsdp_post_all_gather(
        self, outputs: tuple[torch.Tensor, ...], metadata: None, param_dtype: Any, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Return what was gathered, as it is. Gathered again, it is in the same memory as before."""
        return None if out is not None else (outputs[0], ())

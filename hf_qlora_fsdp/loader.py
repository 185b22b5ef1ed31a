"""Loading a model that no rank could hold: read, quantise, exchange, shard, one unit at a time.

    config.json -> a model on the meta device -> its units, the largest first -> for each unit:
        read      every rank reads its share of the unit's tensors from disk     16 bits, one tensor at a time
        quantise  on its accelerator                                             4 bits
        exchange  broadcasts what it made to the other ranks of its node         4 bits
        shard     FSDP keeps 1/N                                                 4 bits / N

Each byte of the checkpoint is thus read by one rank of a node, and what travels is the packed result. Ranks of other
nodes read their own copy: a disk is closer than another machine.
The first load keeps what it made, and later ones read that: 4 bits, nothing to quantise (`loading/shard_cache.py`).

**Memory.** With S the bytes of a rank's shards, U those of a unit in its final form (4 bits, or 16 for the embedding),
and T those of its largest single tensor as it lies in the checkpoint, and once more in the parameter dtype if it is
quantised from that (where transformers makes one weight of several stored ones, all of these), the peak on the device
of a rank while loading is, for the unit that has most of it,

    S + 2 U + T

The two units: the whole one being assembled, and its own staged part with the shard that FSDP copies out of it. T is on
the host while it is read and on the device while it is quantised; smaller tensors are read ahead in its room. The
largest unit goes first, when S is still nothing. Layers that are left whole on every rank (`replicate_layers`) count
into S with all their bytes, and nothing is copied out of them.

The first collective between accelerators waits until files are being read (`_Loading._meet`): NCCL starts with it, and
a disk need not rest meanwhile. What goes before, and what ranks tell each other, goes over gloo.

A rank that cannot read its part tells the others at the end of the unit (`ranks.fail_together`), and all stop.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from .anatomy import Unit
from .experts.layers import CHUNK_BYTES, Experts4bit
from .loading.adapters import check_peft_config, initialize_adapter, inject_adapter
from .loading.blueprint import build_quantized_meta_model
from .loading.fitting import Need, available_bytes, check_fits
from .loading.random_weights import draw_weights
from .loading.shard_cache import choose_folder, consult
from .loading.sources import Piece, Slot, Slots, Source, plan_checkpoint
from .loading.weights import Weights, find_weights
from .mesh import check_gathering, make_mesh, mesh_device
from .offloading.staging import NUM_SLOTS, choose_slot_bytes
from .packed_linear import PackedLinear4bit
from .ranks import fail_together, join_process_group, local_world_size, rank
from .sharding import (
    float32_parameters,
    move_buffers,
    shard_root,
    shard_unit,
)
from .sharding_policy import ReadyUnits, ShardingPolicy

ROOT = Unit("the root", ("",))
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


@dataclass
class LoadReport:
    """What loading took, on this rank.

    Args:
        checkpoint_bytes (`int`): Size of the checkpoint, or of what the shard cache holds in its place.
        from_cache (`bool`): Whether that was a shard cache.
        bytes_read (`int`): What this rank read.
        seconds (`float`): Wall time.
        largest_unit_bytes (`int`): The largest U of the module docstring.
        largest_tensor_bytes (`int`): The largest T.
    """

    checkpoint_bytes: int
    from_cache: bool = False
    bytes_read: int = 0
    seconds: float = 0.0
    largest_unit_bytes: int = 0
    largest_tensor_bytes: int = 0


def load_quantized_model(
    model_id_or_path: str,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: LoraConfig | None = None,
    policy: ShardingPolicy | None = None,
    key_mapping: dict[str, str] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    random_weights: bool = False,
    shard_cache: bool = True,
    shard_cache_dir: str | os.PathLike[str] | None = None,
    expert_chunk_bytes: int = CHUNK_BYTES,
    **kwargs: Any,
) -> nn.Module:
    """Load a causal LM in 4 bits, sharded over all ranks, without any rank ever holding it.

    Peak device memory of a rank: its shards + two units + one tensor in 16 bits (see the module docstring).

    Args:
        model_id_or_path (`str`): Hub id or folder with safetensors files: 16-bit or 32-bit weights, or weights that
            bitsandbytes has quantised to 4 bits, which are taken over byte for byte.
        quantization_config (`BitsAndBytesConfig`, *optional*): 4-bit type and double quantisation, and modules to
            skip. Defaults to NF4 with double quantisation.
        peft_config (`LoraConfig`, *optional*): Adapter to put into the model while it is loaded, inside its units.
        policy (`ShardingPolicy`, *optional*): Parameter dtype, offload and units.
        key_mapping (`dict[str, str]`, *optional*): Renamings of checkpoint tensors, as in `from_pretrained`.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        progress (`bool`): Show a progress bar on rank 0.
        random_weights (`bool`): Draw the weights on the device instead of reading them (`loading/random_weights.py`).
            Only the config is opened, which `model_id_or_path` may then name itself.
        shard_cache (`bool`): Keep the quantised weights on disk, and read them instead of the checkpoint the next time.
            Not for weights that are stored in 4 bits.
        shard_cache_dir (`str`, *optional*): Where. Defaults to `HF_QLORA_FSDP_SHARD_CACHE_DIR`, else to
            `hf_qlora_fsdp/shards` in `HF_HOME`. May be removed at any time.
        expert_chunk_bytes (`int`): Of a mixture of experts: 16-bit weights at a time, see `experts/layers.py`.
        **kwargs: What `from_pretrained` takes: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`,
            `attn_implementation`, `use_kernels`, and values that override the config's.
    Returns:
        `PreTrainedModel`, or `PeftModel` with a `peft_config`: an `FSDPModule` whose `load_report` says what was read.
    Raises:
        ValueError: The checkpoint, the config or the options cannot give such a model. Says why before any weight is
            made.
        RankError: Another rank failed.
    """
    policy = policy or ShardingPolicy()
    join_process_group("cuda" if torch.cuda.is_available() else "cpu")
    if peft_config is not None:
        check_peft_config(peft_config)
    started, mesh = time.monotonic(), make_mesh(checked=False)
    # What is drawn while building would shift the draws of the adapter, which shall be PEFT's own for the same seed.
    with fail_together(f"opening {model_id_or_path}"), torch.random.fork_rng(devices=[]):
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        kernels = {name: kwargs.pop(name) for name in ("use_kernels", "kernel_config") if name in kwargs}
        dtype = policy.param_dtype
        model = build_quantized_meta_model(
            model_id_or_path, quantization_config, dtype, trust_remote_code=trust_remote_code, hub=hub, **kwargs
        )
        for module in model.modules():
            if isinstance(module, Experts4bit):
                module.chunk_bytes = expert_chunk_bytes
        if random_weights:
            source = draw_weights(model, dtype)
        else:
            source = plan_checkpoint(model, Weights(find_weights(model_id_or_path, **hub)), dtype, key_mapping)
        loading = _Loading(model, source, policy, mesh)
        loading.check_room(loading.free_bytes())
    loading.run(peft_config, progress, choose_folder(shard_cache, shard_cache_dir))
    root = loading.root
    loading.report.seconds = time.monotonic() - started
    root.load_report = loading.report
    model.set_use_kernels(kernels.pop("use_kernels", False), **kernels)
    if not random_weights:
        _adopt_generation_config(model, model_id_or_path, hub)
    root.eval()
    return root


@dataclass
class _Loading:
    """The stream from checkpoint to shards: what there is to do, and the doing."""

    model: PreTrainedModel
    source: Source
    policy: ShardingPolicy
    mesh: DeviceMesh
    root: Any = None
    report: LoadReport = field(init=False)
    need: Need = field(init=False)

    def __post_init__(self) -> None:
        self.device = mesh_device(self.mesh)
        self.report = LoadReport(self.source.num_bytes)
        self.report.largest_tensor_bytes = max(piece.transient_bytes for piece in self.source.pieces)
        self.bytes_assigned = [0] * local_world_size()
        self.units = self.policy.plan_units(self.model)
        self.offloaded = self.policy.offloaded_units(self.units)
        self.store = self.policy.make_store(self.device)
        # Adapters rename modules, so tensors are addressed by module object from here on.
        self.modules = dict(self.model.named_modules())
        self.ties = [tuple(map(self._slot, tie)) for tie in self.model.all_tied_weights_keys.items()]
        self.root = self.model
        self.need = self._need()

    def run(self, peft_config: LoraConfig | None, progress: bool, cache: Path | None) -> None:
        if peft_config is not None:
            self.root = inject_adapter(self.model, peft_config)
        # Only now: what is trained whole is wanted in float32, which is another form of it.
        slots = {target: self._slot(target) for piece in self.source.pieces for target in piece.targets}
        self.source, self.report.from_cache = consult(self.source, slots, self.model, self.device, cache)
        self.report.checkpoint_bytes = self.source.num_bytes
        groups = self._group_pieces()
        readers = [self._assign(pieces) for _, pieces in groups]
        me = rank() % local_world_size()
        mine = [
            piece
            for (_, pieces), assigned in zip(groups, readers, strict=True)
            for piece, reader in zip(pieces, assigned, strict=True)
            if reader == me
        ]
        node = _node_group()
        bar = tqdm(
            total=self.source.num_bytes,
            unit="B",
            unit_scale=True,
            desc="Loading",
            disable=not progress or rank() != 0,
        )
        with bar, contextlib.ExitStack() as streaming:
            with fail_together("opening the files that are read"):
                streaming.enter_context(self.source.stream(mine))
            self._meet()
            ready = ReadyUnits(self.units)
            for index, (unit, pieces) in enumerate(groups):
                bar.set_postfix_str(f"unit {index + 1}/{len(groups)}")
                self._assemble(unit.name if unit else "the root", pieces, readers[index], node)
                modules = [self.model.get_submodule(name) for name in unit.modules] if unit else [self.root]
                if peft_config is not None:
                    for module in modules:
                        initialize_adapter(module, peft_config, self.device)
                self._measure(modules)
                self._shard(ready.add(unit) if unit else ROOT)
                bar.update(sum(piece.num_bytes for piece in pieces))
        if self.store is not None:
            with fail_together("finishing the files of offloaded shards"):
                self.store.memory.finish()
        move_buffers(self.root, self.device)
        self.report.bytes_read = self.source.count_bytes_read()

    def _shard(self, unit: Unit | None) -> None:
        """Shard what is in place: a unit, the root, or nothing yet."""
        if unit is None:
            return
        # Parameters change their identity while they come in, so this is asked anew for each unit.
        ignored = float32_parameters(self.model, self.policy.param_dtype, unit.modules)
        if unit is ROOT:
            shard_root(self.root, self.policy, self.mesh, ignored)
            return
        place = self.store if unit.name in self.offloaded else None
        with fail_together(f"sharding {unit.name}"):  # one rank's disk may be full
            shard_unit(self.model, unit, self.policy, self.mesh, ignored, place)

    def _meet(self) -> None:
        """Have the accelerators meet, while the first tensors are being read: NCCL takes up to a second to start.

        It also takes memory of the card, hundreds of MiB, so the card is asked again whether the model fits.
        """
        check_gathering(self.mesh)
        if self.device.type == "cuda":
            with fail_together("asking whether the model fits"):
                self.check_room({"cuda": self.free_bytes()["cuda"]})

    def _group_pieces(self) -> list[tuple[Unit | None, list[Piece]]]:
        """Assign pieces to units, the unit with most bytes first; what no unit covers goes to the root, last."""
        owners = {name: unit for unit in self.units for name in unit.modules}
        groups: dict[str, list[Piece]] = {unit.name: [] for unit in self.units}
        rest: list[Piece] = []
        for piece in self.source.pieces:
            unit = _owner(piece.targets[0], owners)
            (groups[unit.name] if unit else rest).append(piece)
        by_size = sorted(self.units, key=lambda unit: -self._final_bytes(groups[unit.name]))
        return [*((unit, groups[unit.name]) for unit in by_size), (None, rest)]

    def free_bytes(self) -> dict[str, int]:
        """Return what is free, by place."""
        pinned = self.policy.cpu_offload and self.policy.pins_memory(self.device.type)
        return available_bytes(self.device, with_swap=not pinned, folder=self.policy.cpu_offload_dir)

    def check_room(self, free: dict[str, int]) -> None:
        """Refuse a model that does not fit into the free memory of these places."""
        check_fits(str(self.model.config.name_or_path), self.need, self.device.type, free)

    def _need(self) -> Need:
        """Say what loading will take, before any of it is done."""
        groups = {unit.name if unit else "": pieces for unit, pieces in self._group_pieces()}
        sizes = {name: self._final_bytes(pieces) for name, pieces in groups.items()}
        tensors = {name: max((piece.transient_bytes for piece in pieces), default=0) for name, pieces in groups.items()}
        offloaded = [size for name, size in sizes.items() if name in self.offloaded]
        whole = {unit.name for unit in self.units if unit.is_replicated}
        replicated = sum(sizes[name] for name in whole)
        pinned, world_size = self.policy.pins_memory(self.device.type), dist.get_world_size()
        return Need(
            resident_bytes=(sum(sizes.values()) - sum(offloaded) - replicated) // world_size + replicated,
            offloaded_bytes=sum(offloaded) // world_size,
            staging_bytes=0 if pinned or not offloaded else NUM_SLOTS * choose_slot_bytes(offloaded) // world_size,
            mapped=self.policy.cpu_offload_dir is not None,
            kept=self.store is not None and self.store.memory.is_reused,
            replicated_bytes=replicated,
            transient_bytes=max(2 * sizes[name] * (name not in whole) + tensors[name] for name in groups),
            tensor_bytes=self.report.largest_tensor_bytes,
            world_size=world_size,
            ranks_per_host=local_world_size(),
        )

    def _final_bytes(self, pieces: list[Piece]) -> int:
        return sum(self._slot(target).tensor.nbytes for piece in pieces for target in piece.targets)

    def _assign(self, pieces: list[Piece]) -> list[int]:
        """Choose the reader of each piece of the next unit."""
        return _balance([piece.num_bytes for piece in pieces], self.bytes_assigned)

    def _assemble(self, name: str, pieces: list[Piece], readers: list[int], node: dist.ProcessGroup | None) -> None:
        """Make one unit's parameters whole on every rank of the node."""
        num_ranks = local_world_size()
        my_rank = rank() % num_ranks
        whole: dict[str, torch.Tensor] = {}
        with fail_together(f"reading {name}"):
            for piece, reader in zip(pieces, readers, strict=True):
                slots = {target: self._slot(target) for target in piece.targets}
                whole |= piece.make(slots, self.device) if reader == my_rank else _make_room(slots, self.device)
        for piece, reader in zip(pieces, readers, strict=True):
            for target in piece.targets:
                tensor = whole.pop(target)
                if num_ranks > 1:
                    sender = rank() - my_rank + reader
                    dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=sender, group=node)
                _fill(self._slot(target), tensor)
        for (_, tied, tied_leaf), (_, original, original_leaf) in self.ties:
            tied._parameters[tied_leaf] = original._parameters[original_leaf]

    def _slot(self, target: str) -> Slot:
        path, _, leaf = target.rpartition(".")
        module = self.modules[path]
        return Slot(getattr(module, leaf), module, leaf)

    def _measure(self, modules: list[nn.Module]) -> None:
        parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
        num_bytes = sum(parameter.nbytes for parameter in parameters.values() if not isinstance(parameter, DTensor))
        self.report.largest_unit_bytes = max(self.report.largest_unit_bytes, num_bytes)


def _make_room(slots: Slots, device: torch.device) -> dict[str, torch.Tensor]:
    """Allocate what another rank will send."""
    return {target: torch.empty_like(slot.tensor, device=device) for target, slot in slots.items()}


def _fill(slot: Slot, tensor: torch.Tensor) -> None:
    empty, module, leaf = slot
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif slot.is_packed:
        cast(PackedLinear4bit, module).set_packed(tensor)
    else:
        trained = empty.requires_grad
        setattr(module, leaf, nn.Parameter(tensor.float() if trained else tensor, requires_grad=trained))


def _owner(target: str, owners: dict[str, Unit]) -> Unit | None:
    path = target
    while path:
        if path in owners:
            return owners[path]
        path = path.rpartition(".")[0]
    return None


def _balance(sizes: list[int], assigned: list[int]) -> list[int]:
    """Give each piece to the rank with the fewest bytes so far, the largest piece first; all ranks agree.

    Args:
        sizes (`list[int]`): Bytes of each piece.
        assigned (`list[int]`): Bytes that each rank has been given, for units before this one too. Is added to.
    Returns:
        `list[int]`: The reader of each piece.
    """
    readers = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        readers[index] = min(range(len(assigned)), key=lambda reader: (assigned[reader], reader))
        assigned[readers[index]] += sizes[index]
    return readers


def _node_group() -> dist.ProcessGroup | None:
    """Return the ranks of this node, `None` where that is everybody."""
    if local_world_size() >= dist.get_world_size():
        return None
    group, _ = dist.new_subgroups(group_size=local_world_size())
    return group


def _adopt_generation_config(model: PreTrainedModel, model_id_or_path: str, hub: dict[str, Any]) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_id_or_path, **hub)
    except OSError:
        return  # most base models have none; what their config says stays

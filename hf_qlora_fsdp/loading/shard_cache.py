"""The shard cache: what was quantised once is read in 4 bits from then on.

The first load of a model reads 16 bits a weight, quantises, and writes what each rank made into one folder. A later
load with the same settings reads that, a quarter of the bytes, and has nothing to quantise:

    ~/.cache/huggingface/hf_qlora_fsdp/shards/
        3f0c.../                  the key: what decides the values
            rank-0.safetensors    the tensors that rank 0 made, whole and in their final form
            rank-1.safetensors
            manifest.json         what it was made of and by, and a checksum for each 16 MiB
        .writing-3f0c...-1a2b     not yet whole, see `cache_writer.py`

Tensors are whole, so any number of ranks re-cuts them: they are pieces of a source like those of a checkpoint
(`sources.py`), and are read, balanced over the ranks and exchanged in the same way.

**The key** is a hash of all that decides the values: which files the weights are in (`Weights.identify` says what it
notices), which of their tensors become which parameter, its shape, dtype and quantisation, the kind of device that
quantised, and the versions of bitsandbytes and transformers. The name of the model is not in it, nor is the number of
ranks. So another revision, dtype or list of skipped modules is another cache, and a moved folder is the same one.

**The checkpoint stays.** Its headers say which cache is meant, and a broken cache is made anew from it. Weights that
are stored in 4 bits are not cached: nothing would be gained.

**Checked when read.** Each block has a CRC-32 (zlib's: 1.5 GB/s a thread where this was written, with the interpreter
unlocked, where SHA-256 did 1.1; it is against broken disks, not against enemies). A file that is missing or cut short
makes the ranks read the checkpoint and write the cache anew. A tensor whose bytes have changed is named and made from
the checkpoint, on the spot, and the cache is removed after that load, so that the next one writes it.

**Several nodes.** The ranks of a node hold a whole model together, so each node decides for itself: one may find a
cache on its disk while another has to make one. On a disk that they share, the first node writes for all. Nothing in
here can keep a model from being loaded: a folder that is full or read-only costs one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import constants
from transformers import PreTrainedModel

from ..experts.layers import Experts4bit
from ..ranks import local_world_size, log_once, rank
from ..units import format_bytes, format_dtype
from .cache_reader import ShardCache
from .cache_writer import CacheWriter, clear_leftovers, discard
from .sources import Piece, Slot, Slots, Source
from .weights import BLOCK_BYTES

FORMAT = 1
"""Grows with every change of what the files mean."""

FOLDER_VARIABLE = "HF_QLORA_FSDP_SHARD_CACHE_DIR"
"""Environment variable: the folder for caches. Set to nothing, none is read or written unless a script names one."""

_DECIDING_PACKAGES = ("bitsandbytes", "transformers")
_OTHER_PACKAGES = ("hf_qlora_fsdp", "torch", "safetensors")

logger = logging.getLogger("hf_qlora_fsdp")


def choose_folder(shard_cache: bool, shard_cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder that holds all caches, `None` where there shall be none.

    Args:
        shard_cache (`bool`): The switch.
        shard_cache_dir (`str`, *optional*): The folder, if it is not the default one.
    """
    default = os.environ.get(FOLDER_VARIABLE, os.path.join(constants.HF_HOME, "hf_qlora_fsdp", "shards"))
    folder = default if shard_cache_dir is None else shard_cache_dir
    return Path(folder).expanduser().absolute() if shard_cache and str(folder) else None


def consult(
    source: Source, slots: Slots, model: PreTrainedModel, device: torch.device, root: Path | None
) -> tuple[Source, bool]:
    """Replace a source by its cache, or have its cache written. A collective.

    Args:
        source (`Source`): Makes the model from its checkpoint.
        slots (`dict[str, Slot]`): What every target of its pieces will fill.
        model (`PreTrainedModel`): The model without adapters, for its class and config.
        device (`torch.device`): Where weights are quantised.
        root (`Path`, *optional*): The folder that holds all caches.
    Returns:
        `Source`: The same pieces, read from the cache, or writing it as they are made, or as they were.
        `bool`: Whether it is the cache that is read.
    """
    look, cache = _look(source, slots, model, device, root)
    node = rank() // local_world_size()
    looks = _gather(look)
    ours = [other for other in looks if other.node == node]
    if len({other.key for other in ours}) > 1:  # they do not even read the same checkpoint
        for other in ours:
            other.found = other.wants_to_write = False
    num_bytes = sum(slot.tensor.nbytes for slot in slots.values())
    for problem in sorted({other.problem for other in ours if other.problem}):
        _say(problem)
    # Another node may have to write where this one can read, and they agree on that together.
    writes = any(other.wants_to_write for other in looks)
    staging = _agree_on_staging(looks, look, root, num_bytes) if writes else None
    if all(other.found for other in ours):
        assert cache is not None
        log_once("Reading %s from the shard cache %s, not the checkpoint.", format_bytes(num_bytes), cache.folder)
        return cache.make_source(source, slots), True
    if staging is None or root is None:
        return source, False
    folder = root / look.key
    log_once(
        "Writing a shard cache of %s to %s: later loads with these settings read it instead of the checkpoint "
        "(shard_cache=False writes none).",
        format_bytes(num_bytes),
        folder,
    )
    manifest = {"about": _describe_run(model, source.revision), "facts": look.facts, "block_bytes": BLOCK_BYTES}
    writer = CacheWriter(staging, folder, manifest, local_world_size(), rank() % local_world_size())
    return _writing_source(source, slots, writer), False


# ---- What there is ---------------------------------------------------------------------------------------------------


@dataclass
class _Look:
    """What one rank sees."""

    node: int
    key: str = ""
    found: bool = False
    wants_to_write: bool = False
    problem: str = ""
    nonce: str = ""
    facts: dict[str, Any] | None = None


def _look(
    source: Source, slots: Slots, model: PreTrainedModel, device: torch.device, root: Path | None
) -> tuple[_Look, ShardCache | None]:
    look = _Look(rank() // local_world_size(), nonce=secrets.token_hex(8))
    if root is None or source.identify is None:
        return look, None
    try:
        look.facts = json.loads(json.dumps(_describe_source(source, slots, model, device), default=str))
        look.key = hashlib.sha256(json.dumps(look.facts, sort_keys=True).encode()).hexdigest()[:32]
        folder = root / look.key
        if not folder.is_dir():
            look.wants_to_write = True
            return look, None
        cache = ShardCache(folder, look.facts, slots)
    except ValueError as error:
        look.wants_to_write = True
        look.problem = f"The shard cache {root / look.key} is damaged: {error}. It is made anew from the checkpoint."
        return look, None
    except Exception as error:  # the others wait for what this rank has seen, and a model loads without a cache
        look.problem = f"No shard cache is read or written: {type(error).__name__}: {error}."
        return look, None
    look.found = True
    return look, cache


def _describe_source(source: Source, slots: Slots, model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Return all that decides the values, ready for JSON."""
    assert source.identify is not None
    plan = [
        [piece.reads, [(target, *_describe_slot(slots[target])) for target in piece.targets]] for piece in source.pieces
    ]
    return {
        "format": FORMAT,
        "source": source.identify(),
        "plan": hashlib.sha256(json.dumps(sorted(plan, key=str)).encode()).hexdigest(),
        "model": type(model).__name__,
        "device": device.type,
        "versions": _versions(_DECIDING_PACKAGES),
    }


def _describe_slot(slot: Slot) -> tuple[Any, ...]:
    kind = (str(getattr(slot.module, name, None)) for name in ("layout", "compute_dtype", "source_cls"))
    described = (list(slot.tensor.shape), str(slot.tensor.dtype), *(kind if slot.is_packed else ()))
    if isinstance(slot.module, Experts4bit) and slot.leaf in slot.module.layouts:
        return (*described, str(slot.module.layouts[slot.leaf]), str(slot.module.compute_dtype))
    return described


def _describe_run(model: PreTrainedModel, revision: str | None) -> dict[str, Any]:
    """Return what somebody who opens the manifest wants to know, and nothing depends on."""
    config: Any = model.config
    quantization = config.quantization_config
    return {
        "model": config.name_or_path,
        "revision": revision,
        "quantization": {name: value for name, value in quantization.to_dict().items() if not name.startswith("_")},
        "param_dtype": format_dtype(quantization.bnb_4bit_compute_dtype),
        "world_size": dist.get_world_size(),
        "versions": _versions(_DECIDING_PACKAGES + _OTHER_PACKAGES),
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # this one, run from its source tree
            found[package] = importlib.metadata.version(package)
    return found


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _agree_on_staging(looks: list[_Look], look: _Look, root: Path | None, num_bytes: int) -> Path | None:
    """Make the folders that caches are written in; return that of this node, `None` if it shall not write. Collective.

    Where nodes share a disk, each sees the folders of those before it, and leaves the writing to them.
    """
    leaders = [other for index, other in enumerate(looks) if index % local_world_size() == 0]
    wants = root is not None and all(other.wants_to_write for other in looks if other.node == look.node)
    staging = None if root is None else _staging(root, leaders[look.node])
    problem = ""
    if wants and root is not None and staging is not None:
        try:
            if _leads() and any(other.problem for other in looks if other.node == look.node):
                discard(root / look.key)
            staging.mkdir(parents=True, exist_ok=True)
            problem = _prepare(root, num_bytes) if _leads() else ""
        except OSError as error:
            problem = f"No shard cache is written to {root}: {error}."
    states = _gather((look.node, wants, problem))
    failed = {node for node, wanted, said in states if said or not wanted}
    if root is None or staging is None or not wants:
        return None
    earlier = [leader for leader in leaders[: look.node] if leader.node not in failed]
    if look.node not in failed and not any(_staging(root, leader).is_dir() for leader in earlier):
        return staging
    if _leads():
        discard(staging)
        for said in sorted({said for node, _, said in states if said and node == look.node})[:1]:
            logger.warning(said)
    return None


def _staging(root: Path, leader: _Look) -> Path:
    return root / f".writing-{leader.key}-{leader.nonce}"


def _prepare(root: Path, num_bytes: int) -> str:
    """Sweep what dead runs have left; say what stands against writing so many bytes."""
    clear_leftovers(root)
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if free >= num_bytes:
        return ""
    return (
        f"No shard cache is written to {root}: it takes {format_bytes(num_bytes)}, and {format_bytes(free)} are free."
    )


def _writing_source(source: Source, slots: Slots, writer: CacheWriter) -> Source:
    """Return a source whose pieces are handed to the writer as they are made."""

    def make(piece: Piece, slots: Slots, device: torch.device) -> dict[str, torch.Tensor]:
        made = piece.make(slots, device)
        writer.put(made)
        return made

    @contextlib.contextmanager
    def stream(mine: list[Piece]) -> Iterator[None]:
        originals = [by_targets[piece.targets] for piece in mine]
        tensors = {target: slots[target].tensor for piece in mine for target in piece.targets}
        with writer.writing(tensors, budget), source.stream(originals):
            yield

    by_targets = {piece.targets: piece for piece in source.pieces}
    pieces = [replace(piece, make=partial(make, piece)) for piece in source.pieces]
    budget = max(sum(slots[target].tensor.nbytes for target in piece.targets) for piece in pieces)
    return replace(source, pieces=pieces, stream=stream)


# ---- Between ranks ---------------------------------------------------------------------------------------------------


def _gather(value: Any) -> list[Any]:
    """Return what every rank has to say, in the order of ranks."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def _leads() -> bool:
    """Return whether this is the first rank of its node."""
    return rank() % local_world_size() == 0


def _say(message: str) -> None:
    if _leads():
        logger.warning(message)

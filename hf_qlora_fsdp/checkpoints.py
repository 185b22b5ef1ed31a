"""Checkpoint folders that are whole or not there.

A run may be killed at any moment: by the scheduler, by a full disk, by a colleague. So a checkpoint is written where
nobody looks for one, sealed, and only then given its name:

    .saving-checkpoint-500/     adapter, optimizer, scheduler, random states, trainer state: written by all ranks
        manifest.json           last: size and SHA-256 of every file, and what the checkpoint belongs to
    checkpoint-500/             by one rename, after everything has reached the disk

A folder without a manifest, or whose files are not those of its manifest, is no checkpoint. `newest_valid` passes over
it and says why. Nothing in a checkpoint is a pickle that could run code: tensors are safetensors, the rest is JSON.

The manifest also says **what the checkpoint continues**: the base model (by a checksum of its weights as they were
trained against, so that a moved folder is still the same model and another one of the same shape is not), the adapter's
shape, and how many sequences made a step. `check_continues` refuses to go on with anything else.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

MANIFEST = "manifest.json"
STAGING_PREFIX = ".saving-"

_CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")
_PACKAGES = ("hf_qlora_fsdp", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
_CHUNK_BYTES = 1 << 24
_PRIME = 65_521  # the largest below 2^16, as in Adler-32


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, after all its files have reached the disk.

    Args:
        folder (`Path`): The folder, complete but for its manifest.
        facts (`Mapping`): What the checkpoint belongs to, see `describe_run`.
    """
    files = {}
    for path in _files(folder):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        _flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"saved_at": time.time(), "facts": dict(facts), "files": files}, indent=1))
    _flush(manifest)
    for directory in {path.parent for path in [manifest, *_files(folder)]}:
        _flush(directory)


def publish(staging: Path, final: Path) -> None:
    """Give a sealed folder its name. It appears whole: a rename is one step for the file system."""
    if final.exists():  # the same step, saved again after resuming from before it
        old = final.with_name(f"{STAGING_PREFIX}old-{final.name}")
        os.rename(final, old)
        os.rename(staging, final)
        shutil.rmtree(old)
    else:
        os.rename(staging, final)
    _flush(final.parent)


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Args:
        folder (`str`): The checkpoint.
    Returns:
        `dict`: The manifest's facts.
    Raises:
        ValueError: It has no manifest, or a file is missing, cut short or altered. Names the file.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, facts = manifest["files"], manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} has no readable {MANIFEST} ({error}), so it was never finished or is not a "
            "checkpoint of this package. Resume from another one; resume_from_checkpoint=True finds the newest that is "
            "whole."
        ) from error
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"] or hash_file(path) != expected["sha256"]:
            damage = "is missing" if size is None else "is not the file that was saved"
            raise ValueError(
                f"{name} in {str(folder)!r} {damage} (its size is {size}, the manifest says {expected['bytes']}). "
                "Resume from another checkpoint; resume_from_checkpoint=True finds the newest that is whole."
            )
    return facts


def prune(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside the newest one, by the time they were written.

    By time and not by step: after a damaged checkpoint was passed over, or an older one was asked for, higher steps
    are older. Each is renamed before it is removed, so that no half of it keeps a checkpoint's name.

    Args:
        newest (`Path`): The checkpoint that has just been written. It stays.
        limit (`int`, *optional*): How many to keep.
        best (`str`, *optional*): One that stays, whatever its age.
    """
    if not limit or limit < 0:
        return
    kept = {newest.name, Path(best).name if best else newest.name}
    others = [path for path in newest.parent.iterdir() if _is_checkpoint(path) and path.name not in kept]
    others.sort(key=_when_saved)
    for path in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        aside = path.with_name(f"{STAGING_PREFIX}pruned-{path.name}")
        os.rename(path, aside)
        shutil.rmtree(aside)


def newest_valid(output_dir: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the checkpoint that was written last and whose files are all as they were saved.

    The last by time, as its manifest says, and not by step: after a damaged checkpoint was passed over, or a new run
    was started in the same folder, higher steps are older.

    Args:
        output_dir (`str`): Where the run saves.
    Returns:
        The folder, or `None`, and a sentence for each newer one that was passed over.
    """
    folder = Path(output_dir)
    entries = list(folder.iterdir()) if folder.is_dir() else []
    skipped = []
    for candidate in sorted(filter(_is_checkpoint, entries), key=_when_saved, reverse=True):
        try:
            verify(candidate)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return candidate, skipped
    return None, skipped


def _is_checkpoint(path: Path) -> bool:
    return _CHECKPOINT_NAME.match(path.name) is not None


def _when_saved(checkpoint: Path) -> tuple[float, int]:
    """Return when a checkpoint was sealed, and its step; one without a manifest counts as the newest of all."""
    step = int(checkpoint.name.rpartition("-")[2])
    try:
        return float(json.loads((checkpoint / MANIFEST).read_text())["saved_at"]), step
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf"), step


def clear_leftovers(output_dir: str | os.PathLike[str]) -> list[str]:
    """Remove what a run that was killed while saving has left, and return the names."""
    folder = Path(output_dir)
    leftovers = sorted(folder.glob(f"{STAGING_PREFIX}*")) if folder.is_dir() else []
    for leftover in leftovers:
        final = folder / leftover.name.removeprefix(f"{STAGING_PREFIX}old-")
        if leftover.name.startswith(f"{STAGING_PREFIX}old-") and not final.exists():
            os.rename(leftover, final)  # killed between the two renames of `publish`
        else:
            shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]


def describe_run(
    model: nn.Module,
    *,
    base_model: str,
    revision: str | None,
    peft_configs: Mapping[str, Any],
    sequences_per_step: int,
) -> dict[str, Any]:
    """Collect what a checkpoint belongs to. A collective, on the first call for a model.

    Args:
        model (`nn.Module`): The sharded model.
        base_model (`str`): Its name or folder.
        revision (`str`, *optional*): Its commit on the Hub.
        peft_configs (`Mapping[str, LoraConfig]`): The adapters that are trained, by name.
        sequences_per_step (`int`): Batch size times accumulation times ranks.
    """
    return {
        "base_model": base_model,
        "revision": revision,
        "base_checksum": base_checksum(model),
        "adapters": {name: _describe_adapter(config) for name, config in peft_configs.items()},
        "sequences_per_step": sequences_per_step,
        "world_size": dist.get_world_size(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def check_continues(folder: str | os.PathLike[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to continue a checkpoint with another model, adapter or batch; return what else differs.

    Args:
        folder (`str`): The checkpoint, for the message.
        saved (`Mapping`): Its facts.
        now (`Mapping`): Those of this run.
    Raises:
        ValueError: They do not belong together. Names both values.
    """
    if saved["base_checksum"] != now["base_checksum"]:
        raise ValueError(
            f"{str(folder)!r} was trained on {saved['base_model']!r} (weights {saved['base_checksum']}), and the "
            f"model now is {now['base_model']!r} (weights {now['base_checksum']}). An adapter fits only the weights it "
            "was trained on. Pass the model, revision and quantisation of the checkpoint."
        )
    if set(saved["adapters"]) != set(now["adapters"]):
        raise ValueError(
            f"{str(folder)!r} holds the adapters {sorted(saved['adapters'])}, and the model now trains "
            f"{sorted(now['adapters'])}. Give the model the adapters of the checkpoint, or start a new run in another "
            "output_dir."
        )
    for adapter, config in saved["adapters"].items():
        for name, value in config.items():
            given = now["adapters"][adapter].get(name)
            if value != given:
                raise ValueError(
                    f"{str(folder)!r} was trained with {name}={value!r}, and peft_config now has {given!r} (adapter "
                    f"{adapter!r}). Its weights would not mean the same. Set {name}={value!r}, or start a new run in "
                    "another output_dir."
                )
    return [
        f"{name}: {saved['versions'].get(name)} then, {version} now"
        for name, version in now["versions"].items()
        if saved["versions"].get(name) != version
    ]


def base_checksum(model: Any) -> str:
    """Return a checksum of all frozen weights, the same for any number of ranks. A collective; kept on the model.

    Each byte counts, weighted by its place in its tensor and its tensor's place in the model: 4-bit codes and scales as
    they are trained against, so another quantisation, or another order of rows, is another base.
    """
    if getattr(model, "_base_checksum", None) is None:
        total = 0
        for index, parameter in enumerate(parameter for parameter in model.parameters() if not parameter.requires_grad):
            if isinstance(parameter, DTensor):
                local, num_rows = parameter.to_local(), parameter.shape[0]
                start = min(dist.get_rank() * -(-num_rows // dist.get_world_size()), num_rows)
                offset = start * parameter.numel() * parameter.element_size() // max(num_rows, 1)
            elif dist.get_rank() == 0:
                local, offset = parameter, 0
            else:
                continue
            total += (index + 1) * _sum_of_bytes(local, offset)
        totals: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(totals, total)
        model._base_checksum = f"{sum(totals) % (1 << 64):016x}"
    return model._base_checksum


def _sum_of_bytes(tensor: torch.Tensor, offset: int) -> int:
    """Sum a tensor's bytes, each weighted by its place modulo a prime; `offset` bytes lie before the first."""
    total = 0
    for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
        places = torch.arange(offset, offset + chunk.numel(), device=chunk.device) % _PRIME + 1
        total += int((places * chunk).sum())
        offset += chunk.numel()
    return total


def _describe_adapter(config: Any) -> dict[str, Any]:
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets if isinstance(targets, str) or targets is None else sorted(targets),
        "modules_to_save": sorted(config.modules_to_save or []),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # this package, run from its source tree


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have a file's, or a folder's, contents reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoint folders that are whole or not there.

A run may be killed at any moment: by the scheduler, by a full disk, by a colleague. So a checkpoint is written where
nobody looks for one, sealed, and only then given its name:

    .saving-checkpoint-500/     adapter, optimizer, scheduler, random states, trainer state: written by all ranks
        manifest.json           last: size and SHA-256 of every file, and what the checkpoint belongs to
    checkpoint-500/             by one rename, after everything has reached the disk

A folder without a manifest, or whose files are not those of its manifest, is no checkpoint. `newest_valid` passes over
it and says why. Nothing in a checkpoint is a pickle that could run code: tensors are safetensors, the rest is JSON.

The manifest also says what the checkpoint belongs to, which is `continuity.py`'s.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import flush, hash_files

MANIFEST = "manifest.json"
STAGING_PREFIX = ".saving-"

_CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, after all its files have reached the disk.

    Args:
        folder (`Path`): The folder, complete but for its manifest.
        facts (`Mapping`): What the checkpoint belongs to, see `continuity.describe_run`.
    """
    files = {}
    for path in _files(folder):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": hash_files(path)}
        flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"saved_at": time.time(), "facts": dict(facts), "files": files}, indent=1))
    flush(manifest)
    for directory in {path.parent for path in [manifest, *_files(folder)]}:
        flush(directory)


def publish(staging: Path, final: Path) -> None:
    """Give a sealed folder its name. It appears whole: a rename is one step for the file system."""
    if final.exists():  # the same step, saved again after resuming from before it
        old = final.with_name(f"{STAGING_PREFIX}old-{final.name}")
        os.rename(final, old)
        os.rename(staging, final)
        shutil.rmtree(old)
    else:
        os.rename(staging, final)
    flush(final.parent)


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
        if size != expected["bytes"] or hash_files(path) != expected["sha256"]:
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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)

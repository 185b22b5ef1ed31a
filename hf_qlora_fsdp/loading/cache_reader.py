"""Reading a shard cache: every tensor checked, and made anew from the checkpoint where it is broken.

A cache is opened as a checkpoint is, by its headers: a file that is missing, cut short, or not what the manifest
describes is found before a tensor is read. What has changed inside a file is found by the checksum of its block, in
the thread that has just read it. Such a tensor is named, the pieces of the checkpoint make it again, and the cache is
removed after the load, so that the next one writes it: it is never trained on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cache_writer import MANIFEST, discard
from .sources import Piece, Slots, Source
from .weights import BLOCK_BYTES, DTYPES, Weights

logger = logging.getLogger("hf_qlora_fsdp")


class ShardCache:
    """A cache that is there and looks whole.

    Args:
        folder (`Path`): Where it is.
        facts (`dict`): What it must have been made of.
        slots (`dict[str, Slot]`): What its tensors will fill.
    Raises:
        ValueError: A file is missing, cut short, or not what the manifest describes. Names it.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], slots: Slots) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.checksums = {name: list(sums) for name, sums in manifest["checksums"].items()}
            sizes = {name: int(size) for name, size in manifest["files"].items()}
            if (manifest["facts"], manifest["block_bytes"]) != (facts, BLOCK_BYTES):
                raise ValueError("it describes another cache")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{MANIFEST} cannot be used ({type(error).__name__}: {error})") from error
        for name, size in sizes.items():
            path = folder / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual:,} bytes"
                raise ValueError(f"{name} {state}, where {size:,} bytes were written")
        self.weights = Weights([str(folder / name) for name in sizes])
        for target, slot in slots.items():
            stored = self.weights.tensors.get(target)
            expected = (tuple(slot.tensor.shape), slot.tensor.dtype, -(-slot.tensor.nbytes // BLOCK_BYTES))
            found = stored and (stored.shape, DTYPES.get(stored.dtype), len(self.checksums.get(target, ())))
            if found != expected:
                raise ValueError(f"{target!r} is stored as {found}, and should be {expected}")

    def make_source(self, source: Source, slots: Slots) -> Source:
        """Return the pieces of `source`, read from here; what cannot be read is made by `source`.

        A piece's transient stays that of the checkpoint, so that the peak holds for one that is made anew, too.
        """
        pieces = []
        for piece in source.pieces:
            num_bytes = sum(slots[target].tensor.nbytes for target in piece.targets)
            make = partial(self._make, piece)
            pieces.append(replace(piece, num_bytes=num_bytes, make=make, reads=piece.targets))
        budget = max(piece.num_bytes for piece in pieces)
        return Source(
            pieces, lambda: self.weights.bytes_read + source.count_bytes_read(), partial(self._stream, budget)
        )

    @contextlib.contextmanager
    def _stream(self, budget_bytes: int, mine: list[Piece]) -> Iterator[None]:
        names = [name for piece in mine for name in piece.reads]
        with self.weights.reading_ahead(names, budget_bytes, self._check):
            yield
        if self.damaged:  # by now every rank of this run has read what it needs
            discard(self.folder)

    def _check(self, name: str, number: int, block: memoryview) -> None:
        if zlib.crc32(block) != self.checksums[name][number]:
            raise ValueError("its bytes are not those that were written")

    def _make(self, piece: Piece, slots: Slots, device: torch.device) -> dict[str, torch.Tensor]:
        name = ""
        try:
            made = {}
            for name in piece.targets:
                made[name] = self.weights.read(name).to(device)
        except (OSError, ValueError) as error:
            file = self.weights.tensors[name].file
            self.damaged.append(file)
            logger.warning(
                "%r in %s of the shard cache is damaged: %s. It is made anew from the checkpoint, and the cache is "
                "removed where that is allowed; the next load then writes another.",
                name,
                file,
                error,
            )
            try:
                made = piece.make(slots, device)
            except Exception as cause:
                raise ValueError(
                    f"{name!r} in {file!r} is damaged ({error}), and cannot be made from the checkpoint either: "
                    f"{type(cause).__name__}: {cause}. Download the checkpoint again; the cache is then written anew."
                ) from cause
        self.weights.release(piece.targets)
        return made

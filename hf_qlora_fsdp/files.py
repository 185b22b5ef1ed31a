"""Files that are still there after a loss of power, and the fingerprints by which they are known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK_BYTES = 2**24


def flush(path: Path) -> None:
    """Have the contents of a file reach the disk, or of a folder: the names in it, renamed ones too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_files(*paths: str | Path) -> str:
    """Return the SHA-256 of whole files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()

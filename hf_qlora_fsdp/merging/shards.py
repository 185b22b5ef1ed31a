"""Writing a safetensors file tensor by tensor, so that nobody has to hold all of it.

    8 bytes, length of the header | header: JSON, then spaces | data of the first tensor | of the second | ...

`safetensors.torch.save_file` wants every tensor of a file at once, and copies them. But nothing in the format needs
that: the header may be padded with spaces, so room for it is left in front, the data follow as they come, and the
header is written last, when all sizes are known. What is in memory is the one tensor being written.

A file that carries its final name is whole: it is written under another one, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from safetensors import safe_open

from ..files import flush

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Source: https://huggingface.co/docs/safetensors/index#format"""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ENTRY_BYTES = 256
"""Room for dtype, shape and offsets of one tensor in the header: five numbers of 20 digits and the words between."""

_ALIGNMENT = 8


class ShardWriter:
    """One safetensors file in the making; a context manager. Left by an exception, it leaves no file behind.

    Tensors have to begin at a multiple of their item size, or torch cannot view them in place. So the widest come
    first, and `add` refuses another order.

    Args:
        path (`Path`): Where the file shall be. Until then it is `<path>.partial`.
        names (`list[str]`): Names of all tensors that will be added, at least.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self.num_bytes = 0
        self.entries: dict[str, dict[str, object]] = {}
        metadata = len(json.dumps({"__metadata__": {"format": "pt"}}))
        room = metadata + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header_bytes = -(-room // _ALIGNMENT) * _ALIGNMENT

    def __enter__(self) -> ShardWriter:
        self._stream = self._partial.open("wb")
        self._stream.seek(8 + self._header_bytes)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._stream.close()
            if kind is not None:
                self._partial.unlink(missing_ok=True)
        if kind is None:
            self._partial.replace(self.path)
            flush(self.path.parent)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the bytes of one tensor."""
        assert name not in self.entries and self.num_bytes % tensor.element_size() == 0, name
        start, self.num_bytes = self.num_bytes, self.num_bytes + tensor.nbytes
        self.entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self.num_bytes],
        }
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._stream.write(raw.numpy().data)

    def _finish(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        assert len(header) <= self._header_bytes
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def read_dtypes(file: str) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor of a safetensors file, from its header.

    Raises:
        ValueError: One of them has a dtype that torch lacks.
    """
    with safe_open(file, framework="pt") as handle:
        names = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118, a handle is no mapping
    for name, dtype in names.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{name!r} in {os.path.basename(file)!r} has the dtype {dtype}, which cannot be read as numbers "
                "here. Use a checkpoint in 16 bits, or in 4 bits by bitsandbytes."
            )
    return {name: DTYPES[dtype] for name, dtype in names.items()}


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is whole or not there."""
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("w") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    flush(path.parent)

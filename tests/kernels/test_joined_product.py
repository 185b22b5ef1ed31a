"""What layers as one product read, copied into wider rows. What is made of it is tested with `swiglu.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora_fsdp.kernels.joined_product import _copy


class Copies(TorchDispatchMode):
    """Notes in which dtype is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "shape", "strides", "offset", "width", "by_eight"),
    [
        (torch.bfloat16, (5, 96), (96, 1), 0, 112, True),
        (torch.bfloat16, (5, 96), (104, 1), 8, 112, True),  # columns of a wider matrix
        (torch.bfloat16, (5, 96), (0, 1), 0, 112, True),  # one row, expanded
        (torch.bfloat16, (0, 96), (96, 1), 0, 112, True),
        (torch.bfloat16, (1, 96), (3, 1), 0, 112, False),
        (torch.bfloat16, (5, 94), (96, 1), 0, 112, False),
        (torch.bfloat16, (5, 96), (98, 1), 0, 112, False),
        (torch.bfloat16, (5, 96), (96, 1), 2, 112, False),
        (torch.bfloat16, (5, 96), (96, 1), 0, 110, False),
        (torch.bfloat16, (8, 96), (4, 32), 0, 112, False),  # transposed
        (torch.float32, (5, 94), (94, 1), 2, 112, True),
        (torch.float32, (5, 95), (96, 1), 0, 112, False),
    ],
)
def test_rows_are_copied_eight_bytes_at_a_time_where_they_are_made_of_eights(
    dtype, shape, strides, offset, width, by_eight
):
    x = torch.randn(4096).to(dtype).as_strided(shape, strides, offset)
    wide = torch.full((shape[0], width), -9, dtype=dtype)
    with Copies() as copies:
        _copy(wide[:, : shape[1]], x)
    assert torch.equal(wide[:, : shape[1]], x) and (wide[:, shape[1] :] == -9).all()
    assert copies.dtypes == [torch.int64 if by_eight else dtype]

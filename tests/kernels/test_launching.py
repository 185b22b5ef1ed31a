"""A kernel that was compiled for some arguments is launched again for such arguments alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_qlora_fsdp.kernels.launching import Launcher


class Kernel:
    """Takes launches as one of Triton's does, and writes down which way they came."""

    def __init__(self) -> None:
        self.arg_names = ["x_ptr", "y_ptr", "width", "DOUBLE", "SIZE"]
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, DOUBLE: int, SIZE: int, **options: Any) -> Compiled:
            self.launches.append(("asked", grid, *args[2:], DOUBLE, SIZE, options))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.kernel.launches.append(("compiled", grid, *args[2:]))


FIRST = ("asked", (3,), 7, 1, 64, {"num_warps": 4})
AGAIN = ("compiled", (5, 1, 1), 7, 1, 64)


@pytest.mark.parametrize(
    ("version", "places", "expected"),
    [
        (None, [0, 4, 8], [FIRST, AGAIN, AGAIN]),  # float32: four are 16 bytes
        (None, [0, 1, 4], [FIRST, FIRST, AGAIN]),
        (None, [1, 4, 8], [FIRST, FIRST, AGAIN]),  # what was compiled for any address is not kept
        ("7.0", [0, 4, 8], [FIRST, FIRST, FIRST]),
    ],
)
def test_it_is_launched_as_it_was_compiled(monkeypatch, version, places, expected) -> None:
    monkeypatch.setattr(torch.version, "hip", version)
    kernel, memory = Kernel(), torch.zeros(64)
    assert memory.data_ptr() % 16 == 0
    launch = Launcher(kernel, (7,), {"DOUBLE": 1, "SIZE": 64}, num_warps=4)
    for place, (how, *_) in zip(places, expected, strict=True):
        launch(3 if how == "asked" else 5, memory, memory[place:])
    assert kernel.launches == expected


def test_constants_come_in_the_order_of_the_kernel() -> None:
    with pytest.raises(AssertionError, match="another order"):
        Launcher(Kernel(), (7,), {"SIZE": 64, "DOUBLE": 1})

"""A Triton kernel that is launched again and again with the same numbers.

Each launch by `kernel[grid](...)` looks at every argument anew, to find out for which kind of them the kernel was
compiled: some thirty microseconds of Python for a kernel that runs for twenty. Hundreds of launches a step differ in
nothing but addresses. So the first one goes that way and leaves the compiled kernel, and the others hand it their
arguments, as Triton's tutorials do ("Fused Softmax", https://triton-lang.org/main/getting-started/tutorials).

What a kernel is compiled for includes that addresses are multiples of 16. Of tensors where they are not, and where
Triton's interpreter runs, which compiles nothing, each launch is a first one. So is it on AMD's GPUs, for which Triton
also looks whether tensors lie in storages of less than 2 GiB, since their kernels then count in 32 bits.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Launcher:
    """A kernel with all arguments but the tensors, which come first.

    Args:
        kernel (`triton.JITFunction`): The kernel. Its constants are its last parameters.
        numbers (`tuple[int, ...]`): Integers, in the order of its parameters.
        constants (`dict[str, Any]`): Constants, likewise.
        options (`Any`): Of the compiler.
    """

    def __init__(self, kernel: Any, numbers: tuple[int, ...], constants: dict[str, Any], **options: Any) -> None:
        self.kernel, self.numbers, self.constants, self.options = kernel, numbers, constants, options
        self.rest = (*numbers, *constants.values())  # a compiled kernel knows no names
        assert list(constants) == kernel.arg_names[-len(constants) :], "constants in another order than the kernel's"
        self.compiled: Any = None

    def __call__(self, num_programs: int, *tensors: torch.Tensor) -> None:
        """Run it on the current device, which is that of the tensors, always the same, as are their dtypes."""
        compiled, addresses = self.compiled, 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if compiled is not None and addresses % 16 == 0:
            compiled[num_programs, 1, 1](*tensors, *self.rest)
            return
        compiled = self.kernel[(num_programs,)](*tensors, *self.numbers, **self.constants, **self.options)
        if addresses % 16 == 0 and torch.version.hip is None:
            self.compiled = compiled


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

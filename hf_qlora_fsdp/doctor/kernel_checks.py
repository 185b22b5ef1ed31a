"""Are the 4 bits right? bitsandbytes against the definition, and the kernels of this package against bitsandbytes.

As in `software_checks.py`, each check yields findings and tries the real thing: weights are quantised and dequantised
on every device that there is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from .findings import Finding, error, ok, warning
from .software_checks import suggest_reinstalling

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NormalFloat4: QLoRA, arXiv:2305.14314, appendix E."""


_INSTALL_TRITON = "Install triton, which comes with CUDA builds of torch, and a C compiler (gcc), which it needs."


def check_bitsandbytes() -> Iterator[Finding]:
    """Was its native library loaded, and does it quantise by the definition, on every device?"""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        fix = suggest_reinstalling("bitsandbytes")
        override = os.environ.get("BNB_CUDA_VERSION")
        if override:
            fix = f"unset BNB_CUDA_VERSION, which is {override}"
        said = f"The native library of bitsandbytes could not be loaded: {' '.join(lib.error_msg.split())[:300]}"
        if gpus:
            why = f"It was built for other versions of CUDA than that of torch, {torch.version.cuda}, or lacks a part."
            yield error(said, why, f"{fix}; `python -m bitsandbytes` says more")
            return
        yield warning(said, "Quantising on the CPU falls back on slow code.", fix)
    elif gpus and not lib.compiled_with_cuda:
        yield error(
            "bitsandbytes loaded its library for CPUs, and there are GPUs.",
            "There is no 4-bit kernel for them then.",
            "`python -m bitsandbytes` says what it looked for",
        )
        return
    else:
        yield ok(f"native library {os.path.basename(getattr(lib._lib, '_name', '') or '?')}")
    for device in (torch.device("cpu"), *gpus):
        problem = _find_quantization_error(device)
        if problem:
            yield error(
                f"bitsandbytes on {device}: {problem}",
                "Models would be trained on other weights than theirs.",
                f"{suggest_reinstalling('bitsandbytes')}, and report this",
            )
        else:
            yield ok(f"NF4 on {device} is by the definition, code for code.")


def _find_quantization_error(device: Any) -> str:
    """Quantise, and compare with the definition: scale = largest of the block, code = nearest of 16 values."""
    import torch
    from bitsandbytes import functional as bnb_functional

    blocks = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb_functional.quantize_4bit(blocks.to(device), quant_type="nf4", compress_statistics=False)
    back = bnb_functional.dequantize_4bit(packed, state).cpu()
    scales = blocks.abs().amax(1, keepdim=True)
    if not torch.equal(state.absmax.cpu(), scales.view(-1)):
        return "the scales are not the largest numbers of their blocks."
    values, packed = torch.tensor(NF4), packed.cpu().view(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(blocks.shape).long()  # the high half first
    if not torch.equal(back, values[codes] * scales):
        return "dequantised weights are not code times scale."
    distances = (blocks / scales)[..., None] - values
    # Where two values are equally near, rounding decides: of the quotient, of its reciprocal, and of the middle.
    slack = 4 * torch.finfo(torch.float32).eps
    if (distances.abs().gather(-1, codes[..., None])[..., 0] > distances.abs().amin(-1) + slack).any():
        return "codes are not those of the nearest values."
    return ""


def check_kernels() -> Iterator[Finding]:
    """Which kernels run on each device, why, and is what they dequantise what bitsandbytes does?"""
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    for device in devices:
        yield from _check_dequantising(device)
        yield from _check_passes(device)


def _check_passes(device: Any) -> Iterator[Finding]:
    """Does what lies between the products of a layer take one pass over memory?"""
    import torch

    from ..kernels.rms_norm import normalize
    from ..kernels.silu_product import silu_product

    if device.type == "cpu":
        yield ok("On the CPU, SwiGLU and RMSNorm run as operations of torch: there are no fused kernels for them.")
        return
    x = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
    for name, run in (("SwiGLU", lambda: silu_product(x, x)), ("RMSNorm", lambda: normalize(x, x[0], 1e-5))):
        with _Listening() as lines:
            run()
        if lines:
            yield warning(
                f"On {device}, {name} takes several passes over memory instead of one.",
                f"{' '.join(lines)} Steps take somewhat longer; the numbers are the same.",
                _INSTALL_TRITON,
            )
        else:
            yield ok(f"On {device}, {name} takes one pass over memory, by a Triton kernel that was tried just now.")


def _check_dequantising(device: Any) -> Iterator[Finding]:
    import torch
    from bitsandbytes import functional as bnb_functional

    from ..packing import PackedLayout, dequantize, pack

    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    codes, state = bnb_functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = bnb_functional.dequantize_4bit(codes, state)
    layout = PackedLayout((256, 192))
    packed = pack(codes, state, layout, torch.bfloat16)
    with _Listening() as lines:
        found = dequantize(packed, layout, torch.bfloat16)
    if not torch.equal(found, expected):
        yield error(
            f"Packed weights are dequantised wrongly on {device}: {_count_differences(found, expected)}.",
            "Models would be trained on other weights than theirs.",
            "Install the tested versions. If they are installed, report this.",
        )
    elif device.type == "cpu":
        yield ok("On the CPU, packed weights are dequantised by bitsandbytes: there is no fused kernel for it.")
    elif lines:
        yield warning(
            f"On {device}, packed weights are dequantised by three kernels instead of one.",
            f"{' '.join(lines)} Steps take somewhat longer; the numbers are the same.",
            _INSTALL_TRITON,
        )
    else:
        yield ok(f"On {device}, packed weights are dequantised by the fused Triton kernel, tried just now.")


def _count_differences(found: Any, expected: Any) -> str:
    differing = int((found != expected).sum())
    return f"{differing:,} of {expected.numel():,} numbers differ from those of bitsandbytes"


class _Listening(logging.Handler):
    """Collects what the package logs in the meantime, instead of showing it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        log = logging.getLogger("hf_qlora_fsdp")
        self.propagated, log.propagate = log.propagate, False
        log.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        log = logging.getLogger("hf_qlora_fsdp")
        log.removeHandler(self)
        log.propagate = self.propagated

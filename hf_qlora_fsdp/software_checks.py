"""Is the software what it should be? The libraries, their versions and builds, the patches, the 4-bit arithmetic.

Each check yields findings, and raises only what nobody foresaw. The examination runs it in a process that it may take
down with it, so a check tries the real thing instead of guessing at it. Third-party imports are inside the functions:
whether they work is the first question.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

from .findings import Finding, error, note, ok, warning

OLDEST_PYTHON, NEWEST_TESTED_PYTHON = (3, 10), (3, 12)

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NormalFloat4: QLoRA, arXiv:2305.14314, appendix E."""


# -- Python and the libraries ------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """Is this a Python, on a system, that the package is made for?"""
    version = sys.version_info[:2]
    said = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if version < OLDEST_PYTHON:
        yield error(said, "The code needs Python 3.10.", "Make a virtual environment with Python 3.10, 3.11 or 3.12.")
    elif version > NEWEST_TESTED_PYTHON:
        yield note(said, "Newer than what the tests were run with, Python 3.12.")
    else:
        yield ok(said)
    if platform.system() != "Linux":
        yield warning(
            f"This is {platform.system()}, not Linux.",
            "NCCL and limits of containers exist on Linux alone, and nothing else was tested.",
            "On Windows, run inside WSL2.",
        )


def check_library(name: str) -> Iterator[Finding]:
    """Is a library there, in a good version, and can it be imported?"""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield error(f"{name} is not installed.", "The package needs it.", f'pip install "{_requirement(name)}"')
        return
    started = time.monotonic()
    try:
        module = importlib.import_module(name)
    except BaseException as problem:  # what runs on import may raise anything, SystemExit too
        yield _explain_import(name, version, problem)
        return
    if getattr(module, "__file__", None) is None:
        yield error(
            f"`import {name}` finds a folder, {', '.join(getattr(module, '__path__', []))}, not {name} {version}.",
            "A folder of that name lies in the working directory or in PYTHONPATH, and comes before the library.",
            "Rename the folder, or run from another directory.",
        )
        return
    yield _judge_version(name, version, time.monotonic() - started)


def _judge_version(name: str, version: str, seconds: float) -> Finding:
    from .compat.versions import LIBRARIES

    support = LIBRARIES[name]
    tested = f"tested: {', '.join(support.tested)}" if support.tested else "any version"
    said = f"{name} {version} ({tested}), imported in {seconds:.1f} s"
    verdict = support.judge(version)
    if verdict in ("too old", "too new"):
        return error(
            f"{name} {version} is {verdict}: {support.supported} is supported.",
            f"The code relies on what {name} does in these versions.",
            f'pip install "{_requirement(name)}", or {name}=={support.tested[-1]}, which the tests were run with',
        )
    if verdict:
        return note(said, f"Newer than what the tests were run with. If in doubt, {name}=={support.tested[-1]}.")
    return ok(said)


def _requirement(name: str, *, pinned: bool = False) -> str:
    """Return what to ask pip for: the supported range, or the version that was tested last."""
    try:
        from .compat.versions import LIBRARIES
    except ImportError:  # packaging itself is what is missing
        return name
    support = LIBRARIES[name]
    return f"{name}=={support.tested[-1]}" if pinned and support.tested else f"{name}{support.supported}"


def _reinstall(name: str) -> str:
    return f'pip install --force-reinstall --no-deps "{_requirement(name, pinned=True)}"'


def _explain_import(name: str, version: str, problem: BaseException) -> Finding:
    said = f"{name} {version} is installed and cannot be imported: {_describe(problem)}"
    missing = (getattr(problem, "name", None) or "").partition(".")[0]
    if isinstance(problem, ModuleNotFoundError) and missing != name and importlib.util.find_spec(missing) is None:
        return error(said, f"{name} needs {missing}, which is not there.", f"pip install {missing}")
    return error(
        said,
        "Nothing that uses it can run. Such a library is half installed, was built for another version of torch, of "
        "CUDA or of Python, or is hidden by a file of the same name.",
        _reinstall(name),
    )


def _describe(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def check_package() -> Iterator[Finding]:
    """Can all of this package be imported, with these libraries?"""
    package = importlib.import_module(__package__)
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    try:
        for name in names:
            if name != "cli":  # imports nothing but what is imported here
                importlib.import_module(f".{name}", __package__)
    except BaseException as problem:
        yield error(
            f"hf_qlora_fsdp.{name} cannot be imported: {_describe(problem)}",
            "The libraries can be imported, so one of them lacks something that is used here.",
            "Install the tested versions, which are named above. If they are installed, report this.",
        )
        return
    try:
        version = importlib.metadata.version("hf_qlora_fsdp")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    yield ok(f"hf_qlora_fsdp {version} in {package.__path__[0]}")


def check_patches() -> Iterator[Finding]:
    """Which patches of upstream apply to these versions, and can they be put in place?"""
    from . import compat

    log = logging.getLogger("hf_qlora_fsdp")
    for info in pkgutil.iter_modules(compat.__path__):
        patch = getattr(importlib.import_module(f"{compat.__name__}.{info.name}"), "PATCH", None)
        if patch is None:
            continue
        if not patch.is_needed:
            yield ok(f"{patch.name} is not needed here ({patch.affects}).")
            continue
        was, log.disabled = log.disabled, True  # what it logs is said here
        try:
            compat.apply(patch)
            compat.revert(patch)
        except Exception as problem:
            fix = f"Install the tested versions, or report this with the version of {patch.affects}."
            yield error(f"{patch.name} cannot be put in place: {_describe(problem)}", patch.symptom, fix)
        else:
            yield ok(f"{patch.name} replaces {patch.target} during a run. {patch.symptom} Until: {patch.remove_when}.")
        finally:
            log.disabled = was


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def check_bitsandbytes() -> Iterator[Finding]:
    """Was its native library loaded, and does it quantise by the definition, on every device?"""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        fix = _reinstall("bitsandbytes")
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
                f"{_reinstall('bitsandbytes')}, and report this",
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
    """Which kernels dequantise packed weights, why, and is the result that of bitsandbytes?"""
    import torch
    from bitsandbytes import functional as bnb_functional

    from .packing import PackedLayout, dequantize, pack

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    for device in devices:
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
                "Install triton, which comes with CUDA builds of torch, and a C compiler (gcc), which it needs.",
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

"""Are the GPUs what they should be, what links them, and what they talk through?

As in `software_checks.py`, each check yields findings and tries the real thing: a kernel on each GPU, a copy between
each two.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

from ..units import format_bytes
from .findings import Finding, error, note, ok, warning

_GIB = 2**30
LEAST_CAPABILITY = (7, 5)
"""Compute capability below which bitsandbytes ships no kernels for 4 bits."""

_COPY_BYTES = 64 * 2**20


def _ask_driver(*arguments: str) -> list[str]:
    """Return the lines that `nvidia-smi` prints; none where there is no such program, or no driver for it."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def check_gpus() -> Iterator[Finding]:
    """Which GPUs are there, do they compute, and is their memory free?"""
    import torch

    listed = _ask_driver("--query-gpu=name,driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        yield _explain_no_gpu(len(listed))
        return
    driver = listed[0].rpartition(",")[2].strip() if listed else "unknown"
    if torch.version.cuda is None:
        fix = "Tell us how it went"
        yield warning(f"torch {torch.__version__} for ROCm {torch.version.hip}", "Nothing was tested on AMD GPUs.", fix)
    else:
        yield ok(f"torch {torch.__version__} for CUDA {torch.version.cuda}, driver {driver}")
    if len(listed) > torch.cuda.device_count():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield note(
            f"torch sees {torch.cuda.device_count()} of {len(listed)} GPUs: CUDA_VISIBLE_DEVICES={hidden}",
            "Runs use these alone.",
            "unset CUDA_VISIBLE_DEVICES for all of them",
        )
    totals = set()
    for index in range(torch.cuda.device_count()):
        yield from _check_gpu(index)
        totals.add(round(torch.cuda.get_device_properties(index).total_memory / _GIB))
    if len(totals) > 1:
        yield note(
            f"The GPUs have different amounts of memory: {sorted(totals)} GiB.",
            "Each holds an equal share of the model, so the smallest decides.",
            "If the larger ones are enough, export CUDA_VISIBLE_DEVICES with their numbers, as 0,1",
        )


def _explain_no_gpu(num_listed: int) -> Finding:
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not num_listed:
        return note(
            "There is no GPU (no NVIDIA driver answers).",
            "Runs use processes on the CPU: enough for trying out, and too slow for models of any size.",
            "If there should be one, install its driver; in a container, start that with docker run --gpus all",
        )
    if torch.version.cuda is None:
        return error(
            f"There are {num_listed} NVIDIA GPUs, and torch {torch.__version__} was built without CUDA.",
            "Runs would use the CPU.",
            "Install a CUDA build: https://pytorch.org/get-started/locally",
        )
    if hidden is not None:
        return error(
            f"torch sees none of the {num_listed} GPUs: CUDA_VISIBLE_DEVICES={hidden!r}",
            "Runs would use the CPU.",
            "unset CUDA_VISIBLE_DEVICES, or list the numbers of the GPUs to use, as 0,1",
        )
    try:
        torch.cuda.init()
        said = "it does not say why"
    except Exception as problem:
        said = " ".join(str(problem).split())[:300]
    return error(
        f"There are {num_listed} NVIDIA GPUs, and torch, built for CUDA {torch.version.cuda}, cannot use them: {said}",
        "Runs would use the CPU.",
        f"Update the driver to one for CUDA {torch.version.cuda}, or install a build of torch for an older CUDA",
    )


def _check_gpu(index: int) -> Iterator[Finding]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    total = format_bytes(properties.total_memory)
    said = f"GPU {index}: {properties.name}, {total}, compute capability {capability[0]}.{capability[1]}"
    try:
        sums = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16) @ torch.ones(
            64, 64, device=f"cuda:{index}", dtype=torch.bfloat16
        )
        computes = bool((sums == 64).all())
        free, _ = torch.cuda.mem_get_info(index)
    except Exception as problem:
        yield error(
            f"{said}: a first kernel failed: {' '.join(str(problem).split())[:300]}",
            f"This build of torch is for {', '.join(torch.cuda.get_arch_list())}; if the GPU is not among them, there "
            "is no kernel for it. Otherwise it is in use exclusively, or broken.",
            "Install a build of torch for this GPU, or leave it out with CUDA_VISIBLE_DEVICES",
        )
        return
    if not computes:
        yield error(f"{said}: a product is wrong.", "Nothing it computes can be trusted.", "Leave it out, and test it")
    elif capability < LEAST_CAPABILITY:
        fix = "Leave it out with CUDA_VISIBLE_DEVICES"
        yield error(said, "bitsandbytes has no 4-bit kernels below compute capability 7.5.", fix)
    elif capability < (8, 0):
        yield warning(
            f"{said}, no bfloat16",
            "Training computes in bfloat16 unless told otherwise, which this GPU emulates, slowly.",
            "Write fp16=True into QLoRAFSDPConfig",
        )
    else:
        yield ok(f"{said}, bfloat16")
    taken = properties.total_memory - free - torch.cuda.memory_reserved(index)
    if taken > 0.1 * properties.total_memory:  # a CUDA context, ours, takes half a GiB
        yield warning(
            f"GPU {index}: {format_bytes(taken)} of {total} are taken.",
            "Another process holds them, or one that ended badly and is still there.",
            "`nvidia-smi` lists the processes",
        )


def check_links() -> Iterator[Finding]:
    """How do the GPUs reach each other, and does what one sends arrive?"""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return
    kinds = _read_topology(_ask_driver("topo", "-m"))
    pairs = [(first, second) for first in range(count) for second in range(count) if first != second]
    if "CUDA_VISIBLE_DEVICES" not in os.environ and kinds:  # nvidia-smi numbers all of them
        counted = Counter(kinds.get(pair, "?") for pair in pairs if pair[0] < pair[1])
        yield ok("Links: " + ", ".join(f"{number} x {kind}" for kind, number in counted.items()) + _KINDS)
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if without:
        yield note(
            f"{len(without)} of {len(pairs)} ways from GPU to GPU have no peer access, the first {without[0]}.",
            "What they send goes through host memory, which is slower. Usual for consumer cards.",
            "For others, look for a setting of the host that forbids it: IOMMU, ACS, a virtual machine",
        )
    slowest = float("inf")
    for first, second in pairs:
        seconds, arrived = _copy(first, second)
        if not arrived:
            yield error(
                f"What GPU {first} sends to GPU {second} arrives altered.",
                "Models would be trained on garbage. An IOMMU that is switched on does this to peer access.",
                "Switch off the IOMMU in the BIOS (or iommu=pt for the kernel); until then NCCL_P2P_DISABLE=1",
            )
        slowest = min(slowest, _COPY_BYTES / seconds)
    yield ok(f"copies between GPUs: at least {format_bytes(slowest)}/s")


_KINDS = " (NV: NVLink; PIX, PXB: PCIe switches; PHB, NODE: over the CPU; SYS: from one CPU to the other)"


def _read_topology(lines: list[str]) -> dict[tuple[int, int], str]:
    """Return the kind of link of each pair of GPUs: `{(0, 1): "NV18"}`."""
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]  # the header is underlined
    kinds, columns = {}, [word for word in (lines[0].split() if lines else []) if re.fullmatch(r"GPU\d+", word)]
    for line in lines[1:]:
        words = line.split()
        if words and words[0] in columns:
            for column, kind in zip(columns, words[1:], strict=False):
                if kind != "X":
                    kinds[int(words[0][3:]), int(column[3:])] = kind
    return kinds


def _copy(first: int, second: int) -> tuple[float, bool]:
    """Copy random bytes from one GPU to another; return the seconds that it took, and whether they arrived."""
    import torch

    sent = torch.randint(256, (_COPY_BYTES,), dtype=torch.uint8, device=f"cuda:{first}")
    received = torch.empty_like(sent, device=f"cuda:{second}")
    received.copy_(sent)  # the first copy sets the way up
    received.zero_()
    for device in (first, second):
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    received.copy_(sent)
    for device in (first, second):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.equal(received.cpu(), sent.cpu())


def check_collectives() -> Iterator[Finding]:
    """Are NCCL and gloo there, and can processes of this machine find each other?"""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        fix = "Install a build of torch from https://pytorch.org/get-started/locally"
        yield error("torch was built without gloo.", "Processes cannot exchange anything on the host.", fix)
        return
    if not torch.cuda.is_available():
        yield ok("gloo, for processes on the CPU")
    elif not dist.is_nccl_available():
        fix = "Install a build of torch with NCCL: https://pytorch.org/get-started/locally"
        yield error("torch was built without NCCL.", "GPUs cannot exchange anything.", fix)
    else:
        yield ok(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} for GPUs, gloo for the host")
    for name in ("localhost", socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
        except OSError as problem:
            yield warning(
                f"The name {name} has no address: {problem}",
                "Processes find each other by it; they wait for minutes and give up.",
                f'Add a line "127.0.0.1 {name}" to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo on a single machine',
            )

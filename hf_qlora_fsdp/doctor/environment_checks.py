"""Are there variables in the environment that hurt? Most were set once, for another machine or another program.

The table says for each variable which values are meant, what they do to a run, and what to do about it. A variable that
names a network interface is held against the interfaces that there are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .findings import Finding, error, note, ok, warning


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y")


def _is_given(value: str) -> bool:
    return bool(value.strip())


@dataclass(frozen=True)
class Variable:
    """A variable that may hurt.

    Args:
        name (`str`): Its name; with a `*` at its end, all that begin so.
        why (`str`): What it does to a run.
        fix (`str`): What to do. By default, unset it.
        level (`Callable`): Makes the finding of `(what, why, fix)`.
        when (`Callable`): Whether a value is one that is meant.
    """

    name: str
    why: str
    fix: str = ""
    level: Callable[[str, str, str], Finding] = warning
    when: Callable[[str], bool] = _is_on


_LAUNCHER = (
    "Left over from a launcher (torchrun, accelerate, Slurm), so a run started here takes itself for one of its "
    "workers, and waits for the others.",
    "unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT, or open a new shell",
)
VARIABLES = (
    Variable("LOCAL_RANK", *_LAUNCHER, when=_is_given),
    Variable("RANK", *_LAUNCHER, when=_is_given),
    Variable("WORLD_SIZE", *_LAUNCHER, when=_is_given),
    Variable(
        "ACCELERATE_USE_DEEPSPEED",
        "DeepSpeed and FSDP both want to shard the model; a run that finds it set is refused.",
        level=error,
    ),
    Variable("ACCELERATE_USE_CPU", "accelerate computes on the CPU then, whatever else there is.", "unset it for GPUs"),
    Variable("ACCELERATE_USE_FSDP", "It tells transformers and accelerate that each model of any script is sharded."),
    Variable(
        "FSDP_*",
        "accelerate fills gaps in the FSDP options of a run from it; options that nobody wrote then act in every run.",
        "unset it, and write what you want into QLoRAFSDPConfig",
        when=_is_given,
    ),
    Variable(
        "ACCELERATE_MIXED_PRECISION",
        "A run has to agree with it, or is refused.",
        "unset it, and write bf16, fp16 or param_dtype into QLoRAFSDPConfig",
        when=lambda value: value not in ("", "no", "bf16"),
    ),
    Variable(
        "CUDA_LAUNCH_BLOCKING",
        "Each kernel waits for the one before it, and gathering no longer overlaps with computing: for finding errors.",
    ),
    Variable("PYTORCH_NO_CUDA_MEMORY_CACHING", "Each tensor is allocated by the driver, which stops the GPU."),
    Variable("TORCH_DISTRIBUTED_DEBUG", "Each collective is checked by another one.", when=lambda v: v == "DETAIL"),
    Variable("TRITON_INTERPRET", "Triton kernels run in Python, thousands of times slower: for finding errors."),
    Variable(
        "NCCL_P2P_DISABLE",
        "GPUs exchange shards through host memory, which is several times slower. A few consumer cards need it.",
        "unset it, and see whether the live test below still passes",
    ),
    Variable("NCCL_SHM_DISABLE", "GPUs of one machine that have no link exchange shards through the network then."),
    Variable(
        "NCCL_IB_DISABLE", "Machines exchange shards over TCP, not InfiniBand.", "unset it if there is InfiniBand"
    ),
    Variable(
        "NCCL_DEBUG",
        "NCCL writes hundreds of lines.",
        level=note,
        when=lambda value: value.upper() in ("INFO", "TRACE"),
    ),
    Variable(
        "BNB_CUDA_VERSION", "bitsandbytes loads a library for this CUDA, whatever torch was built for.", when=_is_given
    ),
    Variable(
        "HF_QLORA_FSDP_SHARD_CACHE_DIR",
        "Quantised weights are not kept: each run reads and quantises the whole checkpoint again.",
        level=note,
        when=lambda value: not value.strip(),
    ),
    Variable(
        "HF_HUB_OFFLINE",
        "Only models and data sets that are on this disk can be used.",
        level=note,
    ),
    Variable(
        "TRANSFORMERS_OFFLINE",
        "The old name of HF_HUB_OFFLINE: only models that are on this disk can be used.",
        level=note,
    ),
    Variable(
        "HF_DATASETS_OFFLINE",
        "Only data sets that are on this disk can be used.",
        level=note,
    ),
    Variable(
        "PYTHONOPTIMIZE",
        "The checks of this package for its own mistakes are left out.",
        level=note,
        when=lambda value: value not in ("", "0"),
    ),
)


def check_environment() -> Iterator[Finding]:
    """Is something set that makes runs slow, or fail?"""
    findings = [*find_variables(os.environ), *find_allocator_options(os.environ), *find_interfaces(os.environ)]
    yield from findings
    if not findings:
        yield ok("no variable that hurts")


def find_variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for each variable of the table that is set to what it should not be."""
    for variable in VARIABLES:
        start = variable.name.removesuffix("*")
        names = [
            name for name in sorted(environ) if name == start or (start != variable.name and name.startswith(start))
        ]
        for name in names:
            if variable.when(environ[name]):
                yield variable.level(f"{name}={environ[name]}", variable.why, variable.fix or f"unset {name}")


def find_allocator_options(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for options of torch's allocator that waste memory."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        given = environ.get(name, "")
        options = dict(part.strip().split(":", 1) for part in given.split(",") if ":" in part)
        if options.get("backend") == "cudaMallocAsync":
            yield warning(
                f"{name}={given}",
                "With this allocator, what torch reports about memory is not what is in use, and layers of changing "
                "size leave gaps.",
                f"export {name}=expandable_segments:True",
            )
        elif given and options.get("expandable_segments", "").lower() != "true":
            yield warning(
                f"{name}={given}",
                "It has no expandable segments, without which gathering layers of different sizes leaves gaps in the "
                "memory of the GPU; a run may then fail with gigabytes free.",
                f"export {name}=expandable_segments:True",
            )


def find_interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for each network interface that is named and does not exist."""
    existing = [name for _, name in socket.if_nameindex()]
    for variable, exact in (("GLOO_SOCKET_IFNAME", True), ("NCCL_SOCKET_IFNAME", False)):
        given = environ.get(variable, "")
        if given.startswith("^"):  # NCCL: all but these
            continue
        for wanted in filter(None, given.lstrip("=").split(",")):
            if not any(name == wanted or (not exact and name.startswith(wanted)) for name in existing):
                yield error(
                    f"{variable}={given}",
                    f"There is no interface {wanted}, only {', '.join(existing)}; processes will not find each other.",
                    f"unset {variable}, or name one of these",
                )

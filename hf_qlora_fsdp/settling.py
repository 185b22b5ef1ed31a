"""The rules by which arguments are settled, one function a subject. `config.py` calls them in order.

Each takes the `QLoRAFSDPConfig` that is being made and changes its fields, or refuses what they say: several spellings
of one thing must agree, what implies something else sets it, what contradicts itself is an error that says what to
write. Nothing of upstream has seen the arguments yet.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from typing import Any

import torch
from torch.distributed.distributed_c10d import get_backend_config

from . import ranks
from .translation import Translation, parse_bool, parse_names, refusal
from .units import format_dtype, parse_bytes

PRECISIONS = {"bfloat16": (True, False), "float16": (False, True), "float32": (False, False)}
"""Each parameter dtype as `bf16` and `fp16`."""
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""transformers 5.23 has both names, the old one as an alias of the new one; 5.17 and TRL know only the old one."""
_CUDA_AND_CPU = "cuda:nccl,cpu:gloo"


def read_own_fields(config: Any, own: Iterable[Field]) -> None:
    """Read what may be written in several ways, and refuse values that mean nothing.

    Args:
        config (`QLoRAFSDPConfig`): Being made; changed.
        own (`Iterable[Field]`): The fields that are not upstream's.
    """
    defaults = {item.name: item.default for item in fields(config)}
    for old, new in RENAMED.items():  # as upstream does, without its warning about TRL's own default
        if getattr(config, new, None) is not None:
            if getattr(config, old) not in (getattr(config, new), defaults[old]):
                ranks.log_once(f"{new}={getattr(config, new)!r} wins over {old}={getattr(config, old)!r}.")
            setattr(config, old, getattr(config, new))
        elif hasattr(config, new):
            setattr(config, new, getattr(config, old))
    if config.hub_token == "<HUB_TOKEN>":  # what `to_dict` writes, with a token or without
        config.hub_token = None
    for item in own:
        if isinstance(item.default, bool):
            value = getattr(config, item.name)
            setattr(config, item.name, parse_bool(f"{item.name}={value!r}", value))
    names = config.transformer_layer_cls_to_wrap
    config.transformer_layer_cls_to_wrap = parse_names(f"transformer_layer_cls_to_wrap={names!r}", names)
    if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        given = f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}"
        raise refusal(given, "bitsandbytes has two 4-bit data types", 'Write "nf4", or "fp4".')
    if config.expert_chunk is not None:
        try:
            parse_bytes(config.expert_chunk)
        except ValueError:
            given = f"expert_chunk={config.expert_chunk!r}"
            raise refusal(given, "it is no size with a unit", 'Write "256MiB", or "1GiB".') from None
    if config.on_nonfinite not in ("stop", "skip"):
        given = f"on_nonfinite={config.on_nonfinite!r}"
        raise refusal(given, "a step with broken gradients cannot be taken", 'Write "stop", or "skip".')


def take_over(config: Any, brought: Translation, from_launcher: bool = False) -> None:
    """Set the fields that other spellings mean, one line each; silence where they say what holds anyway."""
    defaults = {item.name: item.default for item in fields(config)}
    for name, value in brought.values.items():
        said, current = brought.said[name], getattr(config, name)
        if name == "gradient_checkpointing":
            for spelling in (name, RENAMED[name]):
                if hasattr(config, spelling):
                    setattr(config, spelling, True)
            ranks.log_once(f"{said} is read as {name}=True: it acts once, inside each decoder layer.")
        elif value == current:
            continue
        elif current == defaults[name]:
            setattr(config, name, value)
            ranks.log_once(f"{said} is read as {name}={value!r}.")
        elif not from_launcher:
            raise refusal(f"{name}={current!r} and {said}", "they contradict each other", "Remove one of them.")
        elif value != defaults[name]:
            ranks.log_once(f"{name}={current!r} wins over {said}.")
    for note in brought.notes:
        ranks.log_once(note)


def settle_offload(config: Any) -> None:
    """Let the finer options of offloading say that there is offloading, and refuse what contradicts it."""
    if config.cpu_offload_layers is not None:
        config.cpu_offload_layers = int(config.cpu_offload_layers)
        if config.cpu_offload_layers < 1:
            raise refusal(
                f"cpu_offload_layers={config.cpu_offload_layers}",
                "it is the number of decoder layers to offload",
                "Write 1 or more, or leave it out: cpu_offload alone decides then.",
            )
    if config.cpu_offload_keep_files and config.cpu_offload_dir is None:
        raise refusal(
            "cpu_offload_keep_files=True without cpu_offload_dir",
            "there are no files to keep",
            "Name the folder, cpu_offload_dir=PATH.",
        )
    config.cpu_offload = (
        config.cpu_offload or config.cpu_offload_layers is not None or config.cpu_offload_dir is not None
    )


def settle_replication(config: Any) -> None:
    """Read `replicate_layers`, and refuse what would have the same weights elsewhere."""
    wanted: Any = config.replicate_layers
    if wanted is None:
        return
    if wanted != "all":
        wanted = int(wanted) if str(wanted).isdecimal() else 0  # neither True nor 2.7
        if wanted < 1:
            raise refusal(
                f"replicate_layers={config.replicate_layers!r}",
                "it is the number of decoder layers whose frozen weights every device holds whole",
                'Write 1 or more, "all", or leave it out to shard all of them.',
            )
        config.replicate_layers = wanted
    for name in ("cpu_offload", "cpu_offload_trainable"):
        if getattr(config, name):
            raise refusal(
                f"replicate_layers={wanted!r} with {name}=True",
                "one spends device memory to save time, the other time to save device memory",
                "Leave one of the two out.",
            )


def settle_checkpointing(config: Any) -> None:
    """Read `checkpoint_layers`, and refuse what says otherwise how layers are computed twice."""
    wanted: Any = config.checkpoint_layers
    if wanted is None:
        return
    if wanted != "auto":
        try:
            wanted = int(wanted)
        except (TypeError, ValueError):
            wanted = -1
        if wanted < 0:
            raise refusal(
                f"checkpoint_layers={config.checkpoint_layers!r}",
                "it is the number of decoder layers that are computed twice",
                'Write 0 or more, "auto" for as many as memory demands, or leave it out for all.',
            )
        config.checkpoint_layers = wanted
    given = f"checkpoint_layers={wanted!r}"
    if not config.gradient_checkpointing:
        raise refusal(
            f"{given} with gradient_checkpointing=False",
            "without gradient checkpointing no layer is computed twice",
            "Remove one of them; checkpoint_layers=0 computes none twice until memory runs out.",
        )
    if config.activation_offloading:
        raise refusal(
            f"{given} with activation_offloading=True",
            "all that the other layers keep on the device would be copied to the host and back",
            "Remove one of them.",
        )
    if "every_n_layers" in (config.gradient_checkpointing_kwargs or {}):
        raise refusal(f"{given} and every_n_layers", "both say which layers are computed twice", "Remove one.")


def settle_precision(config: Any) -> None:
    """Let `param_dtype`, `bf16` and `fp16` say the same."""
    if isinstance(config.param_dtype, torch.dtype):
        config.param_dtype = format_dtype(config.param_dtype)
    if config.param_dtype is None:
        config.bf16 = not config.fp16 if config.bf16 is None else config.bf16
    elif config.param_dtype not in PRECISIONS:
        raise refusal(
            f"param_dtype={config.param_dtype!r}",
            "gathered parameters have a floating dtype that the kernels know",
            f"Write one of {', '.join(PRECISIONS)}.",
        )
    else:
        bf16, fp16 = PRECISIONS[config.param_dtype]
        if config.bf16 not in (None, bf16) or (config.fp16 and not fp16):
            raise refusal(
                f"param_dtype={config.param_dtype!r} with bf16={config.bf16} and fp16={config.fp16}",
                "packed 4-bit weights survive only if parameters and computation have one dtype",
                f"Write param_dtype={config.param_dtype!r} alone, or bf16=True or fp16=True alone.",
            )
        config.bf16, config.fp16 = bf16, fp16
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "fp16" if config.fp16 else "bf16" if config.bf16 else "no"):
        ranks.log_once(
            f"ACCELERATE_MIXED_PRECISION={launched} (from accelerate launch) has no effect: the script trains in "
            f"{format_dtype(config.compute_dtype)}."
        )


def choose_device_type(config: Any) -> str:
    """Return the type of the device that trains, and tell upstream where it would guess another."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        config.use_cpu = True
    elif not config.use_cpu and not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator(check_available=True)
        if other is not None and other.type != "mps":  # neither bitsandbytes nor FSDP2 serve Apple's GPUs
            raise refusal(
                f"a machine with {other.type} devices and no CUDA",
                "quantisation and collectives are written and tested for CUDA devices and for CPUs",
                "Write use_cpu=True to train on the CPU.",
            )
        config.use_cpu = True
        ranks.log_once("No CUDA device found: training on the CPU.")
    if config.use_cpu and config.fp16:
        raise refusal(
            f"{'param_dtype=' + repr(config.param_dtype) if config.param_dtype else 'fp16=True'} on a CPU",
            "float16 gradients need loss scaling, which accelerate has for accelerators only",
            'Write param_dtype="bfloat16" or "float32".',
        )
    return "cpu" if config.use_cpu else "cuda"


def join_ranks(config: Any, device_type: str) -> None:
    """Join the process group before upstream does, whose group would serve one kind of device only."""
    if device_type == "cpu" and config.ddp_backend == _CUDA_AND_CPU:  # written by us, on another machine
        config.ddp_backend = None
    elif device_type == "cuda":
        if config.ddp_backend not in (None, _CUDA_AND_CPU):
            ranks.log_once(f"ddp_backend={config.ddp_backend!r} becomes {_CUDA_AND_CPU!r}.")
        config.ddp_backend = _CUDA_AND_CPU
    ranks.join_process_group(device_type, config.ddp_timeout)
    if config.cpu_offload_trainable and "cpu:" not in get_backend_config():
        raise refusal(
            f"cpu_offload_trainable=True in a process group of {get_backend_config()}",
            "gradients are clipped on the CPU then, and the group was made without a CPU backend",
            "Make QLoRAFSDPConfig before any other training arguments, or write "
            f'torch.distributed.init_process_group("{_CUDA_AND_CPU}") at the start of the script.',
        )


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Keep accelerate from setting the number of threads, with a warning, whenever it finds processes on a CPU."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]

"""Out of memory, as an answer: what was asked for, how much was missing, and what to write to have it fit.

An allocator that fails says what it was asked for last, which is rarely all that is missing. While a model loads, the
rest is known (S + 2 U + T, `loader.py`); in a step it is not, so the figure is "at least" then. The number of layers to
offload follows from it: a layer that lies on the host frees its shard.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy import plan_units
from ..errors import DoesNotFitError
from ..loading.blueprint import build_quantized_meta_model
from ..loading.random_weights import draw_weights
from ..ranks import world_size
from ..units import format_bytes, parse_bytes

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB|B)")
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Of a RuntimeError: CUDA's and NCCL's, and those of torch's allocator on the host on Linux and elsewhere."""


@dataclass(frozen=True)
class Shapes:
    """What a rank's part of a model weighs.

    Args:
        layer_bytes (`int`): Of a decoder layer.
        num_layers (`int`): Decoder layers.
        shards_bytes (`int`): S, of everything.
        peak_bytes (`int`): S + 2 U + T, the peak of loading without offloading.
    """

    layer_bytes: int
    num_layers: int
    shards_bytes: int
    peak_bytes: int


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was missing, on the card or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe_shortage(
    error: BaseException, phase: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Say what was missing, in figures and with advice.

    Args:
        error (`BaseException`): What `is_out_of_memory` is true for. Its traceback keeps alive what was allocated.
        phase (`str`): What was being done.
        options (`argparse.Namespace`): Of the rehearsal.
        device (`torch.device`): This rank's.
    Returns:
        `dict`: `place` (`"card"` or `"host"`), `asked_bytes`, `missing_bytes` (`None` where unknown) and `advice`.
    """
    found = _ASKED.search(str(error))
    asked = parse_bytes(f"{found[1]} {found[2].replace('bytes', 'B')}") if found else None
    # NCCL's complaint has no class of its own. Page-locking host memory fails as another one, "CUDA error".
    on_card = isinstance(error, torch.OutOfMemoryError) or "nccl" in str(error).lower()
    missing, advice = None, advise_host(options)
    if on_card:
        shapes = measure_shapes(options)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        limit = min(torch.cuda.get_per_process_memory_fraction(device) * total, reserved + free)
        missing = round((asked or 0) + reserved - limit)
        if phase == "load" and not options.cpu_offload:
            missing = max(missing, round(shapes.peak_bytes - limit))
        advice = advise(options, shapes, missing, world_size(), phase)
    return {
        "place": "card" if on_card else "host",
        "asked_bytes": asked,
        "missing_bytes": missing,
        "advice": advice,
    }


def describe_refusal(error: DoesNotFitError, options: argparse.Namespace) -> dict[str, Any]:
    """Say the same of a model that was refused before anything was asked for, since a place has too little."""
    assert error.place is not None
    advice = {
        "cuda": lambda: advise(options, measure_shapes(options), error.missing_bytes, world_size(), "load"),
        "host": lambda: advise_host(options),
        "disk": lambda: ["--cpu-offload-dir PATH, on a larger disk"],
    }
    return {
        "said": error.said,
        "place": {"cuda": "card"}.get(error.place, error.place),
        "asked_bytes": None,
        "missing_bytes": error.missing_bytes,
        "advice": advice[error.place](),
    }


def measure_shapes(options: argparse.Namespace) -> Shapes:
    """Weigh a model by its config alone."""
    dtype = getattr(torch, options.param_dtype)
    model = build_quantized_meta_model(options.model, None, dtype, hub={}, trust_remote_code=options.trust_remote_code)
    units = plan_units(model)
    sizes = [sum(p.nbytes for name in unit.modules for p in model.get_submodule(name).parameters()) for unit in units]
    layers = [size for unit, size in zip(units, sizes, strict=True) if unit.is_decoder_layer]
    shards = sum({id(parameter): parameter.nbytes for parameter in model.parameters()}.values()) // world_size()
    tensors = [0] * len(units)
    for piece in draw_weights(model, dtype).pieces:
        for index, unit in enumerate(units):
            if any(piece.targets[0].startswith(f"{name}.") for name in unit.modules):
                tensors[index] = max(tensors[index], piece.transient_bytes)
    transient = max(2 * size + tensor for size, tensor in zip(sizes, tensors, strict=True))
    return Shapes(max(layers) // world_size(), len(layers), shards, shards + transient)


def advise(
    options: argparse.Namespace, shapes: Shapes, missing_bytes: int | None, num_ranks: int, phase: str
) -> list[str]:
    """List what would make room on the cards, what costs least first.

    Args:
        options (`argparse.Namespace`): Of the rehearsal.
        shapes (`Shapes`): What the model weighs.
        missing_bytes (`int`, *optional*): How much room is needed.
        num_ranks (`int`): Ranks that share the weights.
        phase (`str`): What was being done. Loading takes the same whatever is trained afterwards.
    """
    advice, trains = [], phase != "load"
    if trains and options.no_gradient_checkpointing:
        advice.append("leave --no-gradient-checkpointing out: only one layer's activations are kept then")
    if trains and not options.activation_offloading:
        advice.append("--activation-offloading, which keeps what layers pass on in host memory")
    if trains and options.batch > 1:
        half, steps = math.ceil(options.batch / 2), options.grad_accumulation * 2
        advice.append(f"--batch {half} --grad-accumulation {steps}: as many sequences a step, half at a time")
    offloaded = options.cpu_offload_layers or 0
    if options.replicate_layers:
        extra = format_bytes((num_ranks - 1) * shapes.layer_bytes)
        advice.append(f"fewer --replicate-layers, or none: each takes {extra} of a card beside its part")
    elif not options.cpu_offload or options.cpu_offload_layers:
        count = offloaded + math.ceil((missing_bytes or 0) / shapes.layer_bytes)
        if missing_bytes and offloaded < count <= shapes.num_layers:
            freed = format_bytes((count - offloaded) * shapes.layer_bytes)
            advice.append(f"--cpu-offload-layers {count} of {shapes.num_layers}, which makes {freed} of room on a card")
        freed = format_bytes(shapes.shards_bytes - offloaded * shapes.layer_bytes)
        advice.append(f"--cpu-offload, which makes {freed} of room on a card and takes as much of the host, a rank")
    if trains and options.seq > 512:
        advice.append(f"--seq {options.seq // 2}, if the data allow it")
    advice.append(f"--nproc {2 * num_ranks}: more cards, each with half the weights")
    return advice


def advise_host(options: argparse.Namespace) -> list[str]:
    """List what would make room on the host."""
    advice = []
    if options.activation_offloading:
        advice.append("leave --activation-offloading out, or a smaller --batch with more --grad-accumulation")
    if options.cpu_offload and options.cpu_offload_dir is None:
        advice.append("--cpu-offload-dir PATH, which needs a disk instead of memory")
        advice.append("--cpu-offload-layers K, which offloads fewer layers")
        if not options.no_pin:
            advice.append("--no-pin and a swap file")
    advice.append("a host with more memory, or a higher limit of its cgroup (memory.max)")
    return advice

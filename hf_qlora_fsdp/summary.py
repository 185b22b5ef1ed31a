"""What a run consists of, in one table: printed once, before the first step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .anatomy import Unit
from .experts.layers import Experts4bit
from .packed_linear import PackedLinear4bit
from .units import format_bytes, format_count, format_dtype, format_table


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count a sharded model's parameters: `"4bit"`, `"16bit"` (all other frozen ones) and `"trained"`.

    A 4-bit weight counts as many parameters as it had in 16 bits.
    """
    counts = {"4bit": 0, "16bit": 0, "trained": 0}
    packed = {
        id(module.weight): module.layout.numel for module in model.modules() if isinstance(module, PackedLinear4bit)
    }
    for module in model.modules():
        if isinstance(module, Experts4bit):
            for name, layout in module.layouts.items():
                packed[id(getattr(module, name))] = layout.num_pieces * layout.piece.numel
    for parameter in model.parameters():
        if id(parameter) in packed:
            counts["4bit"] += packed[id(parameter)]
        else:
            counts["trained" if parameter.requires_grad else "16bit"] += parameter.numel()
    return counts


def local_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of this rank's shards by device type, e.g. `{"cuda": 512, "cpu": 1024}`."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        sizes[local.device.type] += local.nbytes
    return dict(sizes)


def describe(model: Any, units: list[Unit], param_dtype: torch.dtype, offload: str, patches: list[str]) -> str:
    """Describe a sharded model as a table of a few rows.

    Args:
        model (`nn.Module`): The root of the sharded model.
        units (`list[Unit]`): The units it is sharded in.
        param_dtype (`torch.dtype`): Dtype of the computation.
        offload (`str`): How it is offloaded, in words.
        patches (`list[str]`): Names of the upstream patches in place.
    """
    counts = count_parameters(model)
    sizes = " + ".join(f"{format_bytes(size)} on {device}" for device, size in local_bytes(model).items())
    layouts = {module.layout for module in model.modules() if isinstance(module, PackedLinear4bit)}
    kinds = {f"{layout.quant_type}{' double-quantised' if layout.double_quant else ''}" for layout in layouts}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, others = [u for u in units if u.is_decoder_layer], [u.name for u in units if not u.is_decoder_layer]
    num_whole = sum(unit.is_replicated for unit in layers)
    whole = f" ({num_whole} whole on every rank)" if num_whole else ""
    rows = [
        ("model", f"{base.config.name_or_path or type(base).__name__}, sharded over {dist.get_world_size()} ranks"),
        ("units", f"{len(layers)} decoder layers{whole}, {', '.join(others)}"),
        ("4-bit", f"{format_count(counts['4bit'])} parameters, {', '.join(sorted(kinds))}"),
        ("16-bit", f"{format_count(counts['16bit'])} parameters"),
        ("trained", f"{format_count(counts['trained'])} parameters, {', '.join(map(format_dtype, trained))} masters"),
        ("a rank", f"{sizes} (codes, scales, adapter)"),
        ("dtypes", f"compute and storage {format_dtype(param_dtype)}, gradients reduced in float32"),
        ("offload", offload),
        ("patches", ", ".join(patches) or "none"),
    ]
    return format_table(rows, title="hf_qlora_fsdp")

"""Random weights instead of a checkpoint's: the real shapes, and nothing to download.

Whether a model fits, and how fast it trains, depends on the shapes of its weights and not on their values, and the
shapes are all in `config.json`. So a source that draws each weight on the device that quantises it, in the dtype that a
checkpoint's would have there, loads like a checkpoint: the same pieces in the same units, the same quantisation and
exchange, the same peak. Only the reading is missing.

Matrices are normal with the config's own spread, norms one, biases zero: as at the start of pretraining, so that the
first loss is about log(vocabulary) and every kernel sees ordinary numbers. A weight depends on its name and the seed
alone, never on the rank that happens to draw it.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial

import torch
from transformers import PreTrainedModel

from ..experts.layers import Experts4bit
from .recipes import is_packed, logical_shape, stacked_experts
from .sources import Piece, Slots, Source, finish

_DEFAULT_STD = 0.02
"""What most configs say, and all that say nothing mean (`initializer_range` in transformers)."""


def draw_weights(model: PreTrainedModel, param_dtype: torch.dtype, seed: int = 0) -> Source:
    """Plan a model of random weights, one piece a parameter.

    Args:
        model (`PreTrainedModel`): The model, on the meta device, its 4-bit layers in place.
        param_dtype (`torch.dtype`): Dtype in which weights are drawn and quantised.
        seed (`int`): The same seed gives the same weights, over any number of ranks.
    Returns:
        `Source`: Its pieces count the bytes of a checkpoint in `param_dtype`; none of them is read.
    """
    std = getattr(model.config.get_text_config(), "initializer_range", None) or _DEFAULT_STD
    buffers, tied = dict(model.named_buffers()), model.all_tied_weights_keys
    pieces = []
    for name in model.state_dict():
        if name in tied or name in buffers:  # a buffer has the value that it was built with
            continue
        shape = logical_shape(model, name)
        num_bytes = math.prod(shape) * param_dtype.itemsize
        # As for a checkpoint in `param_dtype`: the weight as it is stored, and once more if it is quantised. Experts
        # come one at a time.
        if stacked_experts(model, name):
            transient = 2 * num_bytes // shape[0]
        else:
            transient = 2 * num_bytes if is_packed(model, name) else num_bytes
        pieces.append(Piece((name,), num_bytes, transient, partial(_draw, shape, std, param_dtype, seed)))
    return Source(pieces, lambda: 0)


def _draw(
    shape: tuple[int, ...], std: float, dtype: torch.dtype, seed: int, slots: Slots, device: torch.device
) -> dict[str, torch.Tensor]:
    """Make one parameter."""
    ((name, slot),) = slots.items()
    if isinstance(slot.module, Experts4bit) and slot.leaf in slot.module.layouts:  # one expert at a time
        matrices = (_normal(shape[1:], std, dtype, f"{seed} {name} {expert}", device) for expert in range(shape[0]))
        return {name: slot.module.quantize(slot.leaf, matrices, slot.tensor.dtype, device)}
    if len(shape) > 1 and not slot.leaf.endswith("bias"):
        drawn = _normal(shape, std, dtype, f"{seed} {name}", device)
    else:
        drawn = torch.full(shape, 0 if slot.leaf.endswith("bias") else 1, dtype=dtype, device=device)
    return {name: finish(drawn, slot, device)}


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, what: str, device: torch.device) -> torch.Tensor:
    own_seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") >> 1
    return torch.empty(shape, dtype=dtype, device=device).normal_(
        0, std, generator=torch.Generator(device).manual_seed(own_seed)
    )

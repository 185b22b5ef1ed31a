"""How well a card is used: the multiplications that a step needs, against those the card could do in that time.

A token that passes a matrix of P weights takes 2 P floating-point operations, a multiplication and an addition each.
Training with LoRA on frozen weights is not the usual three times that:

    forward                          2 P    frozen and trained matrices
    backward, for the inputs         2 P    frozen and trained matrices
    backward, for the weights        2 P    trained matrices alone; frozen ones need no gradient of their own
    forward again                    2 P    matrices in decoder layers, with gradient checkpointing, but for the last
                                            one of a fused MLP, which is spared (`kernels/swiglu.py`)

Attention multiplies activations with each other. A token sees (s + 1) / 2 others on average of a causal sequence of s,
and is multiplied with each of them twice (scores, values), 2 w operations each, w being heads x head size:

    forward   2 (s + 1) w a layer;   backward twice that;   forward again with gradient checkpointing

Of the experts of a layer, and of the LoRA on them, a token passes the k that its router chooses: k / E of the weights.
An embedding is a lookup and counts nothing. Windows that are shorter than the sequence are not taken off. What is
computed again is counted, since the card computes it: this is utilisation of the hardware, not of the model.

Source:
    2 P a token, and attention beside it: arXiv:2204.02311 (PaLM), appendix B; recomputation as one more forward:
    arXiv:2205.05198, appendix A. Both count 2 P for gradients of all weights, and PaLM the whole square of attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..experts.layers import Experts4bit
from ..experts.lora import ExpertsA
from ..packed_linear import PackedLinear4bit
from .fusion import FusedMLP

_SIZES = {"cuda": 8192, "cpu": 512}
_SECONDS = {"cuda": 1.0, "cpu": 0.2}
_PRODUCTS_A_ROUND = 5


@dataclass(frozen=True)
class Multiplications:
    """The matrices that a token passes.

    Args:
        frozen (`int`): Frozen weights in decoder layers.
        head (`int`): Frozen weights of the LM head.
        trained (`int`): Trained weights in decoder layers.
        attention (`int`): Heads x head size, summed over the layers.
        spared (`int`), spared_trained (`int`): Of both kinds, weights that checkpointing does not multiply again.
    """

    frozen: int
    head: int
    trained: int
    attention: int
    spared: int = 0
    spared_trained: int = 0

    def flops_per_token(self, sequence_length: int, checkpointing: bool) -> int:
        """Return the operations of forward and backward, see the module docstring."""
        again = 1 if checkpointing else 0
        attention = 2 * (sequence_length + 1) * self.attention
        once = 2 * (2 * self.frozen + 2 * self.head + 3 * self.trained) + 3 * attention
        twice = self.frozen + self.trained - self.spared - self.spared_trained
        return once + again * (2 * twice + attention)


def count_multiplications(base: Any) -> Multiplications:
    """Count a model's matrices.

    Args:
        base (`PreTrainedModel`): The transformers model, with LoRA in it or without, sharded or not.
    """
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", 1)
    frozen = trained = 0
    for module in base.modules():
        if isinstance(module, PackedLinear4bit):
            frozen += module.layout.numel
        elif isinstance(module, Experts4bit):
            numel = sum(layout.num_pieces * layout.piece.numel for layout in module.layouts.values())
            frozen += numel * top_k // module.num_experts
        elif isinstance(module, ExpertsA):
            trained += module.weight.numel() * top_k // module.num_experts
        elif isinstance(module, nn.Linear) and module is not head:
            if module.weight.requires_grad:
                trained += module.weight.numel()
            else:
                frozen += module.weight.numel()
    fused = [mlp for mlp in base.modules() if isinstance(mlp.__dict__.get("forward"), FusedMLP)]
    layouts = [mlp.down_proj.base_layer.layout for mlp in fused]
    adapters = [linear.weight for mlp in fused for linear in mlp.down_proj.modules() if type(linear) is nn.Linear]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Multiplications(
        frozen=frozen,
        head=head.weight.numel() if head is not None else 0,
        trained=trained,
        attention=config.num_hidden_layers * config.num_attention_heads * head_size,
        spared=sum(layout.numel for layout in layouts),
        spared_trained=sum(weight.numel() for weight in adapters),
    )


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of square matrix products: what this card, as cool as it is now, can do."""
    size = _SIZES[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)

    num_rounds, began = 0, 0.0
    while num_rounds < 2 or time.monotonic() - began < _SECONDS[device.type]:
        if num_rounds == 1:  # the first one chose the kernel
            began = time.monotonic()
        for _ in range(_PRODUCTS_A_ROUND):
            torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        num_rounds += 1
    seconds = time.monotonic() - began
    del left, right, product
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return (num_rounds - 1) * _PRODUCTS_A_ROUND * 2 * size**3 / seconds

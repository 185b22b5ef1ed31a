"""TRL's LM head multiplies by its weight three times in a step, where two will do.

The head of a large vocabulary is the widest product of a model. TRL computes the logits of some tokens and some words
at a time, so that they are never there together, and makes them all again in the backward: the gradient of a
log-probability takes the sum over all words, which is known at the end. Here it is some tokens at a time and all words
(as many logits as before), so that the gradient can be made while they are there:

    forward     z = x W'      log p = z_label - log sum exp z      G = (onehot - p) W, rounded to the dtype of x
    backward    dx = d(log p) G, row by row

What is kept is G in the place of x. It is what TRL computes, with the same kernels, for a head that is frozen; where
it is trained or in another dtype than x, or nobody wants a gradient, TRL's own function runs. The gradient of an
entropy, which takes logits again, is not there: asking for it is an error.

Shape suffixes: T tokens, V words, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import Patch

TILE_NUMEL = 4096 * 32768
"""Logits at a time: what TRL has, `TOKEN_CHUNK_SIZE` times `_CHUNKED_LOGPROB_CHUNK_SIZE`."""


def tokens_at_a_time(num_words: int) -> int:
    """Return of how many tokens all logits are made: a multiple of 128 where there is room, which fills a card."""
    most = max(1, TILE_NUMEL // num_words)
    return most - most % 128 if most >= 128 else most


class _FrozenHead(torch.autograd.Function):
    """Per-token log-probabilities and statistics, as of `ChunkedLogProbFunction` of TRL."""

    @staticmethod
    def forward(ctx, x_TH, w_VH, bias_V, labels_T, outputs, numbers):
        from trl.kernels import chunked_logprob as kernels

        ctx.set_materialize_grads(False)
        on_triton, block = kernels._use_triton(x_TH.device), {"BLOCK_SIZE": kernels._BLOCK_SIZE}
        wanted = {f"HAS_{name.upper()}": name in outputs for name in kernels.OPTIONAL_OUTPUTS}
        num_tokens, num_words = x_TH.shape[0], w_VH.shape[0]
        step = tokens_at_a_time(num_words)
        numels = [x_TH.new_full((num_tokens,), start, dtype=torch.float32) for start in _STARTS.values()]
        largest_T, sum_exp_T, x_sum_exp_T, square_sum_T, sum_T, before_T, label_logit_T = numels
        log_z_T, ones_T = torch.empty_like(sum_exp_T), torch.ones_like(sum_exp_T)
        gradient_TH = torch.empty_like(x_TH)
        tile = x_TH.new_empty(min(step, num_tokens), num_words)
        for start in range(0, num_tokens, step):
            rows = slice(start, min(start + step, num_tokens))
            x, z = x_TH[rows], tile[: rows.stop - start]
            torch.mm(x, w_VH.t(), out=z)
            if bias_V is not None:
                z.add_(bias_V)
            fold = kernels._forward_kernel[(len(z),)] if on_triton else kernels._forward_tile
            parts = (part[rows] for part in numels)
            fold(z, z.stride(0), labels_T[rows], *parts, 0, num_words, **wanted, **numbers, **block)
            log_z_T[rows] = largest_T[rows] + sum_exp_T[rows].log()
            grid = len(z), -(-num_words // kernels._BLOCK_SIZE)
            fold = kernels._backward_kernel[grid] if on_triton else kernels._backward_tile
            parts = (part[rows] for part in (log_z_T, log_z_T, ones_T, log_z_T))  # no entropy, and no gradient of it
            kinds = {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": False}
            fold(z, z.stride(0), labels_T[rows], *parts, 0, num_words, **kinds, **numbers, **block)
            sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            kernels._addmm_fp32(sums, z, w_VH)  # as TRL: sums of parts are not rounded to 16 bits
            gradient_TH[rows] = sums
        ctx.save_for_backward(gradient_TH)
        statistics = {
            "entropy": lambda: log_z_T - x_sum_exp_T / sum_exp_T,
            "log_sum_sq_probs": lambda: square_sum_T.log() - 2 * sum_exp_T.log(),
            "mean_logits": lambda: sum_T / num_words,
            "is_top1": lambda: (label_logit_T >= largest_T) & (label_logit_T > before_T),
        }
        computed = [compute() if name in outputs else None for name, compute in statistics.items()]
        ctx.mark_non_differentiable(*(number for number in computed[1:] if number is not None))
        return label_logit_T - log_z_T, *computed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs_T, d_entropy_T, *_):
        if d_entropy_T is not None:
            raise RuntimeError(
                "The entropy of the head's words has no gradient here: it was asked for by a loss that is not TRL's, "
                "and a frozen head makes its gradient in the forward. Detach it."
            )
        if d_logprobs_T is None:
            return (None,) * 6
        (gradient_TH,) = ctx.saved_tensors
        dx_TH = torch.empty_like(gradient_TH)
        torch.mul(gradient_TH, d_logprobs_T.float().unsqueeze(1), out=dx_TH)  # rounded once, as a product in float32
        return dx_TH, None, None, None, None, None


_STARTS = {
    "largest logit": float("-inf"),
    "sum of exponentials": 0.0,
    "their sum with logits": 0.0,
    "sum of their squares": 0.0,
    "sum of logits": 0.0,
    "largest logit before the label": float("-inf"),
    "logit of the label": 0.0,
}


def _build(original: Any) -> Any:
    class ChunkedLogProbFunction:
        """In the place of TRL's: has what is asked of it."""

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None,
            logit_scale: float,
            outputs: tuple[str, ...],
        ) -> tuple[torch.Tensor | None, ...]:
            kind = hidden.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
            wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
            if not (is_frozen and wants_gradient and len(hidden) and weight.dtype == dtype == hidden.dtype):
                others = temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
                return original.apply(hidden, weight, bias, targets, *others)
            numbers = {
                "logit_scale": logit_scale,
                "softcap": final_logit_softcapping or 1.0,
                "inv_t": 1 / temperature,
                "HAS_SOFTCAP": final_logit_softcapping is not None,
            }
            bias = None if bias is None else bias.to(dtype)
            return _FrozenHead.apply(hidden, weight, bias, targets, outputs, numbers)

    return ChunkedLogProbFunction


PATCH = Patch(
    name="trl-head-gradient",
    target="trl.trainer.utils:_ChunkedLogProbFunction",
    affects="trl>=1.16,<1.17",
    symptom="Logits are made again in the backward, also of a head that is frozen.",
    upstream="https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py",
    remove_when="TRL makes the gradient of a frozen head in its forward",
    build=_build,
)

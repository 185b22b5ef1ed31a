"""What an adapter does to the weights of its base: which parameters it changes, and into what.

A LoRA layer computes `x W' + ...` with two thin matrices beside a frozen `W [N, K]`. The same function is one matrix:

    LoRA       W' = W + s B A               A [r, K], B [N, r], s = alpha / r       arXiv:2106.09685, section 4.1
    rsLoRA     the same,                    s = alpha / sqrt(r)                     arXiv:2312.03732
    DoRA       W' = m (W + s B A) / |W + s B A|        m [N], the norm of each row  arXiv:2402.09353, equation 5

`r` and `alpha` may differ from module to module (`rank_pattern`, `alpha_pattern`). Embeddings and `Conv1D` store `W`
transposed, so they are worked on through a transposed view. An adapter may also replace whole parameters
(`modules_to_save`, biases), single rows of an embedding (`trainable_token_indices`), or add to a bias (`lora_bias`).

Of E experts, stacked to `[E, N, K]`, each has factors of its own (`target_parameters`): A [E r, K], expert by expert,
and B [N, r E], in which the expert changes fastest. A checkpoint may hold them stacked, or each of them, or the upper
half of its rows, as a tensor by itself: a `Part`.

An `Edit` is all that happens to one parameter; `merging/edits.py` reads it out of an adapter. The sum is formed in
float32, in blocks of rows, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Part:
    """What of a parameter of stacked experts a tensor holds.

    Args:
        expert (`int`): Of which expert.
        start, stop (`int`): Which rows of its matrix; all of them by default.
    """

    expert: int
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Edit:
    """What happens to one parameter, in this order. Strings are names of tensors in the adapter.

    Args:
        target (`str`): The parameter's name in the model.
        shape (`tuple[int, ...]`): Its shape there.
        replaced_by (`str`, *optional*): Takes the place of the base's.
        left, right (`str`, *optional*): B and A, whose product is added.
        r (`int`): Their rank, by the config.
        scaling (`float`): s of the module docstring.
        magnitude (`str`, *optional*): m of DoRA.
        transposed (`bool`): Whether the parameter is stored as `W.T`.
        added (`str`, *optional*): A vector that is added, times `scaling`.
        row_values (`str`, *optional*): Rows that take the place of the base's.
        rows (`tuple[int, ...]`): Which ones.
        num_experts (`int`, *optional*): E, of stacked experts.
    """

    target: str
    shape: tuple[int, ...]
    replaced_by: str | None = None
    left: str | None = None
    right: str | None = None
    r: int = 0
    scaling: float = 1.0
    magnitude: str | None = None
    transposed: bool = False
    added: str | None = None
    row_values: str | None = None
    rows: tuple[int, ...] = ()
    num_experts: int | None = None


def apply_edit(
    edit: Edit,
    base: torch.Tensor | None,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    part: Part | None = None,
) -> torch.Tensor:
    """Return the merged parameter, or a part of it, on the host. Sums in float32 and rounds once.

    Args:
        edit (`Edit`): What to do.
        base (`torch.Tensor`): The base's parameter, as it is stored, or the part of it. Not changed, and not needed
            where it is replaced.
        read (`Callable`): Reads a tensor of the adapter.
        dtype (`torch.dtype`): Dtype of the result.
        device (`torch.device`): Where to compute.
        part (`Part`, *optional*): Which part. Stacked experts are merged part by part.
    Raises:
        ValueError: The result is not finite.
    """
    weight = base
    if edit.replaced_by:
        weight = read(edit.replaced_by)
        weight = weight[part.expert, part.rows] if part else weight
    assert weight is not None
    merged = torch.empty(weight.shape, dtype=dtype)
    if edit.left and edit.right:
        _add_product(edit, weight, merged, read, device, part)
    elif edit.added:
        merged.copy_(weight.float() + edit.scaling * read(edit.added).float())
    else:
        merged.copy_(weight)
    if edit.row_values:
        merged[list(edit.rows)] = read(edit.row_values).to(dtype)
    if not all(bool(block.isfinite().all()) for block in merged.split(_rows_at_a_time(merged))):
        raise ValueError(
            f"Merging gives {edit.target!r} values that are not finite in {dtype}: the adapter or the base holds NaN "
            "or infinity, or the sum is too large for the dtype. `hf-qlora-fsdp check` on the adapter tells which; a "
            "wider dtype (bfloat16, float32) helps in the last case."
        )
    return merged


def same_effect(first: Edit, second: Edit, read: Callable[[str], torch.Tensor]) -> bool:
    """Return whether two edits make the same tensor of the same base, as they should for two tied parameters."""
    if (first.scaling, first.rows) != (second.scaling, second.rows):
        return False
    for name in ("replaced_by", "row_values", "magnitude"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(read(one), read(other))):
            return False
    factors = []
    for edit in (first, second):
        left, right = (read(name) if name else torch.empty(0, 0) for name in (edit.left, edit.right))
        factors.append((right.t(), left.t()) if edit.transposed else (left, right))
    (left, right), (other_left, other_right) = factors
    return torch.equal(left, other_left) and torch.equal(right, other_right)


def _add_product(
    edit: Edit,
    weight: torch.Tensor,
    merged: torch.Tensor,
    read: Callable[[str], torch.Tensor],
    device: Any,
    part: Part | None,
) -> None:
    left, right = (factor.to(device, torch.float32) for factor in _factors(edit, read, part))
    magnitude = read(edit.magnitude).to(device, torch.float32).reshape(-1, 1) if edit.magnitude else None
    if edit.transposed:
        weight, merged = weight.t(), merged.t()
    step = _rows_at_a_time(weight)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        block = weight[rows].to(device, torch.float32)
        block = torch.addmm(block, left[rows], right, alpha=edit.scaling)
        if magnitude is not None:
            block *= magnitude[rows] / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        merged[rows] = block.to(merged.dtype).to(merged.device)


def _factors(edit: Edit, read: Callable[[str], torch.Tensor], part: Part | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B `[N, r]` and A `[r, K]`: of a layer, or of an expert, as far as they reach its rows.

    Source:
        `ParamWrapper.get_delta_weight` (peft/tuners/lora/layer.py)
    """
    assert edit.left and edit.right and (part is None) == (edit.num_experts is None)
    left, right = read(edit.left), read(edit.right)
    if part is None or edit.num_experts is None:
        return left, right
    left = left.unflatten(1, (-1, edit.num_experts))[:, :, part.expert]
    right = right.unflatten(0, (edit.num_experts, -1))[part.expert]
    return (left, right[:, part.rows]) if edit.transposed else (left[part.rows], right)


def _rows_at_a_time(tensor: torch.Tensor) -> int:
    return max(1, _BLOCK_BYTES // max(1, 4 * tensor[:1].numel()))

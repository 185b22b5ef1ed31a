"""Rows and the matrices they belong to: the products of a mixture of experts.

A router sends every token to a few experts. Sorted by expert, the rows of one expert lie together, and a layer is a
product of groups: rows 0..11 times the matrix of expert 0, rows 12..14 times that of expert 1, and so on. An expert
that nobody was sent to is a group of no rows; nothing is computed for it, and its gradient is zero, not missing: all
ranks have to reduce the gradients of the same parameters.

There are two ways to compute such a product. A **loop** takes one group after the other. `grouped_mm` of torch takes
all of them in one launch, which matters for many small experts. It wants rows of a multiple of 16 bytes that begin at
one and, on GPUs, bfloat16 and compute capability 8.0; elsewhere the loop does the same.

How many rows each group has is known on the device. The loop needs it on the host, and so does whoever wants to leave
groups out: the host then waits for all that the device has to do before. `Groups` asks when it is asked.

Shape suffixes: S rows (tokens times experts a token), G groups, K and N the columns of input and output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm

from ..ranks import log_once


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which matrix.

    Args:
        ends (`torch.Tensor`): First row after each group, `[G]` (int32), on the device of the rows.
        num_rows (`int`): How many rows there are.
        fused (`bool`): Whether to use `grouped_mm` where it can be used.
    """

    ends: torch.Tensor
    num_rows: int
    fused: bool = False

    @classmethod
    def count(cls, group_of_row: torch.Tensor, num_groups: int, fused: bool = False) -> Groups:
        """Count the rows of each group.

        Args:
            group_of_row (`torch.Tensor`): Group of each row, `[S]`, in ascending order.
            num_groups (`int`): How many groups there are.
            fused (`bool`): See `Groups`.
        """
        # Not bincount: on GPUs, it waits for the device.
        numbers = torch.arange(num_groups, device=group_of_row.device)
        ends = torch.searchsorted(group_of_row, numbers, right=True, out_int32=True)
        return cls(ends, len(group_of_row), fused)

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Return the first row of each group, and the number of rows. Waits for the device, once."""
        bounds = [0, *self.ends.tolist()]
        assert bounds[-1] == self.num_rows, "rows of groups that do not exist"
        return bounds

    def rows(self, start: int, stop: int) -> slice:
        """Return the rows of the groups from `start` up to `stop`."""
        if (start, stop) == (0, len(self.ends)):
            return slice(0, self.num_rows)
        return slice(self.bounds[start], self.bounds[stop])

    def runs(self, longest: int) -> Iterator[tuple[int, int]]:
        """Yield runs of neighbouring groups, as `(start, stop)`, that cover those that have rows.

        Where a run is one launch, it goes on over groups without rows: their matrices are made in vain, which costs
        less than to begin again behind each of them. One expert of Qwen3-30B-A3B takes 3 microseconds by the rate of an
        H100's memory, and a run ten launches. In a loop, groups without rows are left out.

        Args:
            longest (`int`): Groups that a run may have. If it may have all of them, and there are enough rows for each
                to have some, it has, and the host does not wait to be told which ones are hit.
        """
        num_groups = len(self.ends)
        if self.fused and num_groups <= min(longest, self.num_rows):
            yield 0, num_groups
        else:
            yield from self.hit_runs(longest, bridging=self.fused)

    def hit_runs(self, longest: int, bridging: bool = False) -> Iterator[tuple[int, int]]:
        """Yield runs that begin and end with groups that have rows, of at most `longest` groups.

        Args:
            longest (`int`): Groups that a run may have.
            bridging (`bool`): Whether groups without rows may lie between those of a run.
        """
        hit = [group for group in range(len(self.ends)) if self.bounds[group] < self.bounds[group + 1]]
        run = hit[:1]
        for group in hit[1:]:
            if group >= run[0] + longest or (group > run[-1] + 1 and not bridging):
                yield run[0], run[-1] + 1
                run = []
            run.append(group)
        if run:
            yield run[0], run[-1] + 1


def runs_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device has `grouped_mm` for this dtype, and say so once if it has not."""
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        log_once("grouped_mm needs bfloat16 and a GPU of compute capability 8.0: experts take turns instead.")
        return False
    return True


def can_fuse(x_SK: torch.Tensor, w_GKN: torch.Tensor) -> bool:
    """Return whether `grouped_mm` takes these, and say so once if it does not.

    Source:
        `_can_use_grouped_mm` (transformers/integrations/moe.py), and the checks of `torch.nn.functional.grouped_mm`.
    """
    if not runs_grouped_mm(x_SK.device, x_SK.dtype):
        return False
    if any(columns * x_SK.dtype.itemsize % 16 for columns in w_GKN.shape[1:]):
        log_once(
            "grouped_mm needs rows of a multiple of 16 bytes, and the matrices of experts are %d x %d here (one may be "
            "a LoRA rank): experts take turns instead.",
            *w_GKN.shape[1:],
        )
        return False
    if x_SK.data_ptr() % 16 or w_GKN.data_ptr() % 16:
        log_once("grouped_mm needs memory that begins at a multiple of 16 bytes: experts take turns instead.")
        return False
    return True


def in_rows(x_SK: torch.Tensor) -> torch.Tensor:
    """Return the rows one after the other in memory, with the strides that say so.

    `grouped_mm` asks for strides of 16 bytes, and in the gradient of matrices for rows that are not columns of memory.
    A single row is contiguous to torch whatever its strides, hence the views.
    """
    return x_SK.contiguous().view(-1).view(x_SK.shape)


def multiply_groups(
    x_SK: torch.Tensor,
    w_GKN: torch.Tensor,
    groups: Groups,
    start: int = 0,
    out_SN: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Return the product of every group, or write that of some to their rows of `out_SN`. Not differentiable.

    Args:
        x_SK (`torch.Tensor`): All rows.
        w_GKN (`torch.Tensor`): The matrices of all groups, or of some neighbouring ones alone.
        groups (`Groups`): Which rows belong to which group.
        start (`int`): The first of these groups.
        out_SN (`torch.Tensor`, *optional*): All rows of the result. Without it, `w_GKN` has to have all groups.
        add (`bool`): Whether the product is added to what `out_SN` holds.
    """
    stop = start + len(w_GKN)
    assert out_SN is not None or len(w_GKN) == len(groups.ends)
    # A single product needs no launch saved, and is written where it belongs, which grouped_mm cannot do.
    if groups.fused and len(w_GKN) > 1 and can_fuse(x_SK, w_GKN):
        rows = groups.rows(start, stop)
        ends = groups.ends[start:stop] - rows.start if rows.start else groups.ends[start:stop]
        product = grouped_mm(in_rows(x_SK[rows]), w_GKN, offs=ends)
        if out_SN is None:
            return product
        if add:
            out_SN[rows].add_(product)
        else:
            out_SN[rows] = product
        return out_SN
    if out_SN is None:
        out_SN = x_SK.new_empty(len(x_SK), w_GKN.shape[2])
    for group, w_KN in enumerate(w_GKN, start):
        rows = groups.rows(group, group + 1)
        if add:
            out_SN[rows].addmm_(x_SK[rows], w_KN)
        else:
            torch.mm(x_SK[rows], w_KN, out=out_SN[rows])
    return out_SN


class _GroupedProduct(torch.autograd.Function):
    """y = x @ w for every group, with the gradients of both."""

    @staticmethod
    def forward(ctx, x_SK: torch.Tensor, w_GKN: torch.Tensor, groups: Groups) -> torch.Tensor:
        x_SK = in_rows(x_SK)
        ctx.save_for_backward(x_SK, w_GKN)
        ctx.groups = groups
        return multiply_groups(x_SK, w_GKN, groups)

    @staticmethod
    def backward(ctx, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_SK, w_GKN = ctx.saved_tensors
        groups: Groups = ctx.groups
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply_groups(grad_SN, w_GKN.transpose(1, 2), groups)
        if ctx.needs_input_grad[1]:
            if groups.fused and can_fuse(grad_SN, w_GKN):
                grad_w = grouped_mm(x_SK.t(), in_rows(grad_SN), offs=groups.ends)
                # What is written for a group without rows is up to the kernel.
                empty_G = groups.ends.diff(prepend=groups.ends.new_zeros(1)) == 0
                grad_w = grad_w.masked_fill_(empty_G[:, None, None], 0)
            else:
                grad_w = torch.zeros_like(w_GKN)
                for start, stop in groups.hit_runs(1):
                    rows = groups.rows(start, stop)
                    grad_w[start] = x_SK[rows].t() @ grad_SN[rows]
        return grad_x, grad_w, None


def grouped_product(x_SK: torch.Tensor, w_GKN: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return `[S, N]`: each row times the matrix of its group. Differentiable in both.

    Args:
        x_SK (`torch.Tensor`): The rows, sorted by group.
        w_GKN (`torch.Tensor`): The matrix of every group.
        groups (`Groups`): Which rows belong to which group.
    """
    return _GroupedProduct.apply(x_SK, w_GKN, groups)


class RowsOfTokens(torch.autograd.Function):
    """Each token k times, in the order of the rows. Autograd's own gradient of an index sorts it all over again."""

    @staticmethod
    def forward(ctx, x_TH: torch.Tensor, order: torch.Tensor, place_of_row: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.place_of_row, ctx.top_k = place_of_row, top_k
        return x_TH[order // top_k]

    @staticmethod
    def backward(ctx, grad_SH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        shape = len(grad_SH) // ctx.top_k, ctx.top_k, grad_SH.shape[1]
        return grad_SH[ctx.place_of_row].view(shape).sum(1), None, None, None


class Reordered(torch.autograd.Function):
    """Rows in another order, whose inverse is known."""

    @staticmethod
    def forward(ctx, x_SH: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x_SH[order]

    @staticmethod
    def backward(ctx, grad_SH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_SH[ctx.inverse], None, None

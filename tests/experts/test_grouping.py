"""Products of groups: in a loop and fused, both equal the plain ones, with zero gradients for groups without rows."""

from __future__ import annotations

import pytest
import torch

from hf_qlora_fsdp.experts.grouping import Groups, grouped_product, multiply_groups, runs_grouped_mm

SIZES = [0, 3, 5, 0, 0, 1, 2, 0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_each_group(dtype: torch.dtype, fused: bool) -> None:
    check_products("cpu", dtype, fused, SIZES)


@pytest.mark.parametrize("fused", [False, True])
def test_no_rows_at_all(fused: bool) -> None:
    check_products("cpu", torch.float32, fused, [0] * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [SIZES, [0] * 4])
@pytest.mark.parametrize("fused", [False, True])
def test_products_and_gradients_on_a_gpu(fused: bool, sizes: list[int]) -> None:
    check_products("cuda", torch.bfloat16, fused, sizes)


def check_products(device: str, dtype: torch.dtype, fused: bool, sizes: list[int]) -> None:
    # Memory that grouped_mm might leave unwritten shall not happen to hold zeros.
    del_me = torch.full((1 << 20,), float("nan"), device=device, dtype=dtype)
    del del_me
    generator = torch.Generator().manual_seed(0)
    group_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    # Small whole numbers: sums of their products are exact in every dtype, whatever the order.
    x = torch.randint(-2, 3, (sum(sizes), 32), generator=generator).to(device, dtype).requires_grad_()
    w = torch.randint(-2, 3, (len(sizes), 32, 16), generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randint(-2, 3, (sum(sizes), 16), generator=generator).to(device, dtype)
    groups = Groups.count(group_of_row.to(device), len(sizes), fused)
    y = grouped_product(x, w, groups)
    y.backward(grad)
    parts = list(zip(x.split(sizes), w, grad.split(sizes), strict=True))
    assert torch.equal(y, torch.cat([x_part @ w_part for x_part, w_part, _ in parts]))
    assert x.grad is not None and w.grad is not None
    assert torch.equal(x.grad, torch.cat([grad_part @ w_part.t() for _, w_part, grad_part in parts]))
    assert torch.equal(w.grad, torch.stack([x_part.t() @ grad_part for x_part, _, grad_part in parts]))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_rows_may_lie_in_memory_in_any_way(num_rows: int) -> None:
    """Column by column, or one row in place of all: grouped_mm takes neither, as rows nor as their transpose."""
    groups = Groups.count(torch.arange(num_rows) // 3, 2, fused=True)
    w = torch.ones(2, 32, 16)
    columns, same = torch.arange(32.0 * num_rows).view(32, num_rows).t(), torch.arange(32.0).expand(num_rows, 32)
    for x in (columns, same):
        weights = w.clone().requires_grad_()
        y = grouped_product(x, weights, groups)
        assert torch.equal(y, x.sum(1, keepdim=True).expand(num_rows, 16))
        grad = torch.ones(16, num_rows).t() if x is columns else torch.ones(1, 16).expand(num_rows, 16)
        y.backward(grad)
        assert weights.grad is not None
        assert torch.equal(weights.grad[0], x[:3].sum(0)[:, None].expand(32, 16))
        assert torch.equal(weights.grad[1], x[3:].sum(0)[:, None].expand(32, 16))


def test_memory_that_grouped_mm_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    groups = Groups.count(torch.tensor([0, 1, 1]), 2, fused=True)
    x, w = torch.ones(1 + 3 * 8)[1:].view(3, 8), torch.ones(2, 8, 8)
    assert torch.equal(grouped_product(x, w, groups), torch.full((3, 8), 8.0))
    assert "begins at a multiple of 16 bytes" in caplog.text


def test_a_stride_that_grouped_mm_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    groups = Groups.count(torch.tensor([0, 1, 1]), 2, fused=True)
    x, w = torch.eye(3, 8, dtype=torch.bfloat16), torch.ones(2, 8, 4, dtype=torch.bfloat16)
    assert torch.equal(grouped_product(x, w, groups), torch.ones(3, 4, dtype=torch.bfloat16))
    assert "8 x 4" in caplog.text


def test_float16_has_no_grouped_product_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """Known before rows are grouped, so that nothing is made in vain for a launch that there will not be."""
    assert not runs_grouped_mm(torch.device("cuda"), torch.float16)
    assert "experts take turns" in caplog.text
    assert runs_grouped_mm(torch.device("cpu"), torch.float16)


def test_runs_of_groups_that_have_rows() -> None:
    groups = Groups.count(torch.tensor([1, 1, 2, 3, 6]), 8)
    assert list(groups.hit_runs(2)) == [(1, 3), (3, 4), (6, 7)]
    assert [groups.rows(*run) for run in groups.hit_runs(8)] == [slice(0, 4), slice(4, 5)]
    assert list(groups.runs(8)) == [(1, 4), (6, 7)]
    none = Groups.count(torch.tensor([], dtype=torch.int64), 8)
    assert list(none.hit_runs(8)) == list(none.hit_runs(8, bridging=True)) == []


def test_a_launch_goes_on_over_groups_without_rows() -> None:
    """As few runs as cover those that have some, none longer than it may be, none that begins or ends in vain."""
    rows = torch.tensor([1, 1, 3, 4, 9, 13, 14])
    groups = Groups.count(rows, 16, fused=True)
    assert list(groups.runs(4)) == [(1, 5), (9, 10), (13, 15)]
    assert list(groups.runs(3)) == [(1, 4), (4, 5), (9, 10), (13, 15)]
    assert list(groups.runs(15)) == [(1, 15)]
    x, w = torch.randn(7, 8), torch.randn(16, 8, 8)
    expected = torch.stack([row @ w[group] for row, group in zip(x, rows.tolist(), strict=True)])
    for longest in (3, 4, 15):
        out = torch.full_like(x, torch.nan)
        for start, stop in groups.runs(longest):
            multiply_groups(x, w[start:stop], groups, start, out)
        torch.testing.assert_close(out, expected)


def test_the_host_is_not_told_what_it_need_not_know() -> None:
    """Where all groups are one run, and likely to have rows, nothing waits for the device."""
    groups = Groups.count(torch.tensor([0, 0, 1, 3]), 4, fused=True)
    x, w = torch.eye(4, 8).requires_grad_(), torch.ones(4, 8, 8).requires_grad_()
    assert list(groups.runs(4)) == [(0, 4)]
    assert torch.equal(grouped_product(x, w, groups), torch.ones(4, 8))
    assert "bounds" not in vars(groups)
    assert list(groups.runs(3)) == [(0, 2), (3, 4)]
    few = Groups.count(torch.tensor([0, 0, 1]), 4, fused=True)
    assert list(few.runs(4)) == [(0, 2)]

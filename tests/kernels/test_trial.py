"""A kernel that cannot be used costs one trial and one line, whatever the compiler says. What real ones do is tested
beside them."""

from __future__ import annotations

import logging

import pytest

from hf_qlora_fsdp.kernels.trial import OtherNumbers, tried


def test_a_kernel_is_tried_once_for_each_kind_and_one_line_says_why_it_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kinds = []

    @tried("Sheep are counted one by one.")
    def find(kind: int) -> str:
        kinds.append(kind)
        if kind == 1:
            raise RuntimeError("at 3:7:\n    sheep += wolf\n" + "^" * 9999)
        return "kernel"

    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert [find(1), find(1), find(2), find(2)] == [None, None, "kernel", "kernel"]
    assert kinds == [1, 2]
    (line,) = caplog.messages
    assert line.startswith("Sheep are counted one by one. RuntimeError: at 3:7: sheep += wolf ^^^")
    assert "\n" not in line and len(line) < 600


def test_a_kernel_with_other_numbers_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    @tried("Goats are counted one by one.")
    def find() -> str:
        raise OtherNumbers("Two and two are five here.")

    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        assert find() is None
    assert caplog.messages == ["Goats are counted one by one. Two and two are five here."]

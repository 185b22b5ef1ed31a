"""Sizes that people write, read as they meant them or not at all."""

from __future__ import annotations

import pytest

from hf_qlora_fsdp.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * 2**30),
        (" 24 gib ", 24 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        (".5KiB", 512),
        ("80GB", 80 * 10**9),
        ("7 B", 7),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "", "-1GiB", "0GiB", "0.1B", "1,5GiB", "24GiB or so"])
def test_what_is_no_size_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: it needs .*Write 24GiB, or 24GB") as raised:
        parse_bytes(text)
    assert repr(text) in str(raised.value)


def test_what_is_formatted_can_be_read() -> None:
    for num_bytes in (1, 2**10, 3 * 2**20, 2**30 // 2, 5 * 2**39):
        assert parse_bytes(format_bytes(num_bytes)) == num_bytes

"""Numbers for people. Inside the package a size is an `int` of bytes; only text says GiB, and only through here."""

import re

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "K", "M", "B", "T")


def format_bytes(num_bytes: float) -> str:
    """Format a size: `format_bytes(13_207_024_435)` is `"12.3 GiB"`."""
    value, unit = _scale(num_bytes, 1024, _BINARY)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """Read a size that a person wrote: `parse_bytes("24GiB")` is `25_769_803_776`, `parse_bytes("80 GB")` is 80e9.

    Raises:
        ValueError: It is no size above zero, or has no unit.
    """
    factors = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
    factors |= {f"{prefix}b".lower(): 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    num_bytes = round(float(match[1]) * factors.get(match[2].lower(), 0)) if match else 0
    if num_bytes < 1:
        raise ValueError(
            f"{text!r} is not a size: it needs a number above zero and a unit, since 24 could mean 24 GiB (2^30 bytes "
            "each) or 24 GB (10^9). Write 24GiB, or 24GB."
        )
    return num_bytes


def format_count(count: float) -> str:
    """Format a number of parameters: `format_count(70_553_706_496)` is `"70.6B"`."""
    value, unit = _scale(count, 1000, _DECIMAL)
    return f"{value:.0f}{unit}" if not unit else f"{value:.1f}{unit}"


def format_seconds(seconds: float) -> str:
    """Format a duration: `format_seconds(3725)` is `"1:02:05"`, `format_seconds(65)` is `"1:05"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_dtype(dtype: object) -> str:
    """Format a `torch.dtype` without its module: `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def format_table(rows: list[tuple[str, str]], title: str = "") -> str:
    """Format label and value pairs as an aligned two-column table, one row a line."""
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {value}" for label, value in rows]
    return "\n".join([title, *lines] if title else lines)


def _scale(value: float, base: int, names: tuple[str, ...]) -> tuple[float, str]:
    for name in names[:-1]:
        if abs(value) < base:
            return value, name
        value /= base
    return value, names[-1]

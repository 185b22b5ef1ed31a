"""What an examination says: findings, each with its level, its reason and its remedy.

    ok        as it should be
    note      nothing is wrong, and worth knowing
    warning   runs will be slower than they could be, or fail under some circumstances
    error     runs will fail, or compute something else

A finding that is no good news says why it matters and what to do; without both it cannot be made.

Third-party imports are what is examined, so there are none here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("ok", "note", "warning", "error")
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        level (`str`): One of `LEVELS`.
        what (`str`): What was found.
        why (`str`): Why it matters.
        fix (`str`): What to do.
    """

    level: str
    what: str
    why: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS and self.what
        assert self.level == "ok" or (self.why and self.fix), f"no reason or no remedy for: {self.what}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(what: str) -> Finding:
    """Return good news."""
    return Finding("ok", what)


def note(what: str, why: str, fix: str) -> Finding:
    """Return what is worth knowing."""
    return Finding("note", what, why, fix)


def warning(what: str, why: str, fix: str) -> Finding:
    """Return what makes runs slower, or lets some of them fail."""
    return Finding("warning", what, why, fix)


def error(what: str, why: str, fix: str) -> Finding:
    """Return what makes runs fail."""
    return Finding("error", what, why, fix)


def count_levels(findings: Iterable[Finding]) -> dict[str, int]:
    """Return how many findings there are of each level."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in LEVELS}


def format_finding(check: str, finding: Finding) -> str:
    """Format a finding for people: its level, the check that made it, what was found, and why and fix below it."""
    lines = _wrap(f"{finding.level:<8} {check:<14} ", finding.what)
    for label, text in (("why", finding.why), ("fix", finding.fix)):
        if text:
            lines += _wrap(" " * 24 + f"{label}: ", text)
    return "\n".join(lines)


def _wrap(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )

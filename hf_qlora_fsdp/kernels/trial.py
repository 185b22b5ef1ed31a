"""A kernel is tried before it is used: on the device it is for, against what defines it.

Whether one can be used depends on more than can be asked for: on Triton, on a C compiler for what Triton generates, on
what both know of a device. So it is run there once, on a small example. Where that fails, or other numbers come out,
the operations that it would replace go on being used, and one line says so, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from ..ranks import log_once

Kernel = TypeVar("Kernel")


class OtherNumbers(Exception):
    """A kernel runs, but what it computes is not what it should."""


def tried(instead: str) -> Callable[[Callable[..., Kernel]], functools._lru_cache_wrapper[Kernel | None]]:
    """Make a function that tries a kernel one that returns `None` where it cannot be used, and tries it once.

    The function imports the kernel, runs it, compares, and returns it; `OtherNumbers`, or whatever is raised on the
    way, says why it cannot be used. What it is called with is what another kernel would be compiled for.

    Args:
        instead (`str`): What happens without the kernel: the sentence that is logged before the reason.
    """

    def decorate(find: Callable[..., Kernel]) -> functools._lru_cache_wrapper[Kernel | None]:
        @functools.cache
        @functools.wraps(find)
        def find_or_say(*args: object, **kwargs: object) -> Kernel | None:
            try:
                return find(*args, **kwargs)
            except Exception as error:  # no triton, no C compiler for what it generates, a device it does not know
                kind = "" if isinstance(error, OtherNumbers) else f"{type(error).__name__}: "
                log_once("%s %s%s", instead, kind, " ".join(str(error).split())[:500])
                return None

        return find_or_say

    return decorate

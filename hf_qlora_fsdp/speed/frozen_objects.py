"""Not looking for garbage, while training, among what was there before.

A process that has imported TRL and loaded a model holds half a million objects or more, and Python looks through all of
them for cycles every fifty steps or so, which takes a third of a second. A rank that does it lets all others wait, each
at its own moment. What training leaves behind is found just as well without them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Leave objects that are alive now out of collections, until the context is left.

    What somebody else had frozen before is as other objects are then.
    """
    gc.collect()  # garbage would be kept as well
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

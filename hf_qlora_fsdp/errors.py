"""The exceptions that this package owns.

What a user can cause is a `ValueError` whose message has three parts: what was given, why it cannot work, what to
write instead. What remains are failures that no argument could have prevented.
"""


class ShardingError(RuntimeError):
    """A model that should be sharded is not, or a rank holds a full weight."""


class PatchError(RuntimeError):
    """An upstream object that a patch replaces is not where the patch expects it."""


class RankError(RuntimeError):
    """Another rank failed, so that this one cannot go on. The message carries the rank and what it said."""


class WorkerError(RuntimeError):
    """A process that a notebook started failed. The message says which, and the cause is its traceback."""


class EmptyAdapterError(RuntimeError):
    """An adapter without a single tensor was about to be written."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is infinite or not a number, and the run was told to stop."""

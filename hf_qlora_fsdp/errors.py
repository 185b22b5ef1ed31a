"""The exceptions that this package owns.

What a user can cause is a `ValueError` whose message has three parts: what was given, why it cannot work, what to
write instead. What remains are failures that no argument could have prevented.
"""

from __future__ import annotations


class DoesNotFitError(ValueError):
    """A run takes more memory than there is. Nothing was written wrongly, so a command ends with 1, as a plan does.

    Args:
        said (`str`): What does not fit.
        advice (`str`): What to write instead.
        place (`str`, *optional*): `"cuda"`, `"host"` or `"disk"`.
        missing_bytes (`int`, *optional*): How much is missing there.
    """

    def __init__(self, said: str, advice: str, place: str | None = None, missing_bytes: int | None = None) -> None:
        super().__init__(said, advice, place, missing_bytes)  # what it is made of again where it is unpickled
        self.said, self.advice, self.place, self.missing_bytes = said, advice, place, missing_bytes

    def __str__(self) -> str:
        return f"{self.said} {self.advice}"


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


def exit_code_of(error: BaseException) -> int:
    """Return what a command ends with that ends with this: 2 where other arguments would have helped, else 1."""
    return 2 if isinstance(error, ValueError) and not isinstance(error, DoesNotFitError) else 1

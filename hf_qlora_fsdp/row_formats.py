"""Rows in forms that TRL does not read, and what makes them such that it does.

TRL knows messages, prompt and completion, and text. `dataset_format` names another form that the rows have; they are
turned into one of those before TRL sees them, and all columns of the old form are dropped: one that is left over, such
as the `text` that Stanford's own Alpaca data carries beside its three columns, would be taken for what is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import alpaca, sharegpt
from .translation import nearest, refusal

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "alpaca": alpaca.to_prompt_completion,
    "alpaca_chat": alpaca.to_messages,
    "sharegpt": sharegpt.to_messages,
}


def reform_rows(rows: Dataset | IterableDataset, dataset_format: str) -> Any:
    """Return the rows in a form that TRL reads.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Rows as they are stored.
        dataset_format (`str`): The form that they have: `"alpaca"`, `"alpaca_chat"` or `"sharegpt"`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: As many rows, in the same order.

    Raises:
        ValueError: There is no such format, or a row does not have it. The rows of an `IterableDataset` are looked at
            as they arrive.
    """
    if dataset_format not in FORMATS:
        why = "there is no such form of rows"
        raise refusal(f"dataset_format={dataset_format!r}", why, nearest(dataset_format, FORMATS))
    columns = rows.column_names or list(next(iter(rows)))
    return rows.map(FORMATS[dataset_format], remove_columns=columns)

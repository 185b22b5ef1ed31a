"""The rows to train on and to evaluate on: files, folders and the Hub, one dataset or a mixture.

A name is read in one way wherever it stands, as `dataset_name`, as `eval_dataset_name` or as `path` in a mixture: a
file by its ending, a folder by what lies in it, and what is neither is asked for at the Hub. What the rows hold
(`messages`, `prompt` and `completion`, or `text`) is for TRL to tell, and looked at before the model is loaded
(`inputs.py`); rows as Alpaca or ShareGPT have them are brought into one of these forms when they say so.

Every rank reads for itself, and all must hold the same rows in the same order. So rows to be held out are drawn here,
with the seed of the run: TRL draws them without any, which gives each rank a split of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pandas  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig

from ..ranks import log_once
from ..translation import refusal
from . import alpaca, sharegpt

_BUILDERS = {"json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet", "csv": "csv", "txt": "text"}
"""By the ending of a file. Compressed files have one ending more, as in rows.jsonl.gz."""

_NAMING = (
    "Give a file (.json, .jsonl, .parquet, .csv, .txt), a folder of such files, or the id of a dataset on the Hub, and "
    "a split that it has."
)

_FORMS = {
    "alpaca": alpaca.to_prompt_completion,
    "alpaca_chat": alpaca.to_messages,
    "sharegpt": sharegpt.to_messages,
}
_COLUMNS = {"messages", "prompt", "completion", "text", "input_ids", "image", "images"}
# Columns by which rows of others are known, and what to write for them.
_FOREIGN = (
    ({"instruction", "output"}, "--dataset_format alpaca, or alpaca_chat for the chat template of the tokenizer"),
    ({"conversations"}, "--dataset_format sharegpt"),
)

Rows: TypeAlias = Dataset | IterableDataset


def load_data(
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    *,
    eval_name: str | None = None,
    form: str | None = None,
    evaluate: bool = False,
    seed: int = 42,
    text_field: str = "text",
) -> tuple[Rows, Rows | None]:
    """Load what is trained on, and what is evaluated on.

    Args:
        script (`ScriptArguments`): One dataset, `dataset_name`, with its configuration and splits.
        mixture (`DatasetMixtureConfig`): Several, `datasets`; and `test_split_size`, which holds rows out of either.
        eval_name (`str`, *optional*): Another dataset, to evaluate on.
        form (`str`, *optional*): Form of all rows, of `_FORMS`, from which they are brought into one that TRL reads.
        evaluate (`bool`): Whether there is to be an evaluation.
        seed (`int`): Draws the rows that are held out.
        text_field (`str`): Column of plain text.
    Returns:
        `tuple`: Rows to train on, and rows to evaluate on or `None`.
    Raises:
        ValueError: There is no such file, dataset or split, the Hub cannot be reached, or rows cannot be read.
    """
    streaming = script.dataset_streaming
    if mixture.datasets:
        streaming = mixture.streaming
        train = _load_mixture(mixture, form, text_field)
    else:
        assert script.dataset_name is not None, "the arguments were checked"
        train = _load(script.dataset_name, script.dataset_config, script.dataset_train_split, streaming, form)
    _check_readable(train, form, text_field)
    if not evaluate:
        return train, None
    if mixture.test_split_size is not None:
        return _hold_out(train, mixture.test_split_size, seed)
    if eval_name is not None:
        test = _load(eval_name, None, _only_split(eval_name, script.dataset_test_split), streaming, form)
        _check_readable(test, form, text_field)
        return train, test
    assert script.dataset_name is not None, "the arguments were checked"
    return train, _load(script.dataset_name, script.dataset_config, script.dataset_test_split, streaming, form)


def _check_readable(rows: Any, form: str | None, text_field: str) -> None:
    """Refuse rows of which SFT reads nothing, with the option that would make it read them, if there is one."""
    columns = set(rows.column_names or ())
    if form is not None or not columns or columns & {*_COLUMNS, text_field}:
        return
    options = (option for known, option in _FOREIGN if known <= columns)
    others = "--dataset_text_field COLUMN for plain text, or rename columns to prompt and completion, or messages"
    raise refusal(
        f"rows with the columns {', '.join(sorted(columns))}",
        f"SFT reads messages, prompt and completion, input_ids, or text in the column {text_field!r}",
        f"Write {next(options, others)}.",
    )


def _load_mixture(mixture: DatasetMixtureConfig, form: str | None, text_field: str) -> Rows:
    """Put several datasets one after the other, as `trl.get_dataset` does, each read as a single one would be."""
    parts: list[Any] = []
    for part in mixture.datasets:
        files = {name: value for name in ("data_dir", "data_files") if (value := getattr(part, name)) is not None}
        rows = _load(part.path, part.name, part.split, mixture.streaming, None, **files)
        if part.columns is not None:
            with _reading(f"columns={part.columns} of {part.path!r}", "Write columns that it has."):
                rows = rows.select_columns(part.columns)
        parts.append(_bring_into_form(rows, form))
        _check_readable(parts[-1], form, text_field)
    _check_columns(mixture, parts)
    fractions = [part.fraction for part in mixture.datasets if part.fraction is not None]
    if fractions:
        if len(fractions) < len(parts) or mixture.streaming or min(fractions) < 0 or not any(fractions):
            raise refusal(
                f"fraction in {len(fractions)} of {len(parts)} datasets{' with streaming' * mixture.streaming}",
                "shares of a mixture are for all of it, add up to more than nothing, and need to know how long it is",
                "Give each dataset a fraction, 0 or more, or none of them; and do without streaming.",
            )
        # As long as it can be without a row twice, or so that one dataset is used up.
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(rows) / share for rows, share in zip(parts, shares, strict=True) if share)
        parts = [rows.select(range(round(share * total))) for rows, share in zip(parts, shares, strict=True)]
    with _reading("datasets", "Give columns of one name values of one type, or leave them out with `columns`."):
        return concatenate_datasets(parts)


def _check_columns(mixture: DatasetMixtureConfig, parts: list[Any]) -> None:
    """Refuse rows of several forms: what one lacks would be filled with nothing, and trained on."""
    read = [_COLUMNS.intersection(rows.column_names or []) for rows in parts]
    for part, columns in zip(mixture.datasets, read, strict=True):
        if columns != read[0]:
            raise refusal(
                f"datasets with {mixture.datasets[0].path!r} and {part.path!r}",
                f"of the columns that SFT reads one has {sorted(read[0])}, and the other {sorted(columns)}",
                "Bring them into one form, or train on one of them after the other.",
            )


def _hold_out(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    if not isinstance(rows, Dataset):
        raise refusal(
            f"test_split_size={size} with streaming",
            "rows that arrive one by one cannot be drawn from",
            "Write eval_dataset_name, or do without streaming.",
        )
    try:
        split = rows.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise refusal(
            f"test_split_size={size} of {len(rows)} rows",
            f"it leaves nothing on one side ({error})",
            "Write a fraction between 0 and 1, or a smaller number of rows.",
        ) from error
    return split["train"], split["test"]


def _load(name: str, config: str | None, split: str, streaming: bool, form: str | None, **files: Any) -> Rows:
    # With files named beside it, a name is a builder in the terms of `load_dataset`.
    source = {"path": name} | files if files else find_source(name)
    if config is not None and "data_files" in source and not files:
        raise refusal(f"the configuration {config!r} of the file {name!r}", "files have none", "Leave it out.")
    with _reading(f"the dataset {name!r}, split {split!r}", _NAMING):
        rows = load_dataset(split=split, name=config, streaming=streaming, **source)
    return _bring_into_form(rows, form)


def _bring_into_form(rows: Any, form: str | None) -> Rows:
    """Return rows of prompt and completion, or of messages, and nothing else that they had."""
    if form is None:
        return rows
    first: dict[str, Any] = next(iter(rows), {})
    return rows.map(_FORMS[form], remove_columns=list(first))


def check_prepared(prepared: Rows, given: Rows, args: SFTConfig, *, evaluation: bool = False) -> None:
    """See that rows have tokens to learn once TRL has cut them, and say how many have none.

    TRL leaves out a row whose prompt alone fills `max_length`, without a word. Where it packs, it keeps such rows, and
    a run of nothing else goes on to its end with a loss of 0.

    Args:
        prepared (`Dataset` or `IterableDataset`): What TRL made of the rows; one that is streamed is not looked at.
        given (`Dataset` or `IterableDataset`): The rows.
        args (`SFTConfig`): What the trainer was given.
        evaluation (`bool`): Whether they are those to evaluate on.
    Raises:
        ValueError: None of them has a token to learn.
    """
    if not isinstance(prepared, Dataset) or "labels" not in prepared.column_names:
        return
    doing = "evaluated" if evaluation else "trained"
    labels = prepared.select_columns("labels").with_format("arrow").iter(batch_size=256)
    if not any(_has_token(batch["labels"]) for batch in labels):  # as a rule the first batch has
        raise refusal(
            f"{len(given)} rows to be {doing} on and max_length={args.max_length}",
            "none is left with a token to learn within it: what is learned comes after it, or is empty",
            "Write a larger --max_length, or look at the rows.",
        )
    packed = args.packing if not evaluation or args.eval_packing is None else args.eval_packing
    if not packed and len(prepared) < len(given):
        log_once(
            "%d of %d rows have no token to learn within max_length=%s, and are not %s on.",
            len(given) - len(prepared),
            len(given),
            args.max_length,
            doing,
        )


def _has_token(labels: Any) -> bool:
    return bool(pyarrow.compute.any(pyarrow.compute.not_equal(labels.combine_chunks().flatten(), -100)).as_py())


@contextlib.contextmanager
def _reading(given: str, instead: str) -> Iterator[None]:
    """Say in our words what `datasets` could not do."""
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ or error
        raise refusal(given, f"they cannot be read ({type(cause).__name__}: {cause})", instead) from error


def find_source(name: str) -> dict[str, Any]:
    """Return what `load_dataset` takes for a name: `{"path": "json", "data_files": "rows.jsonl"}`.

    Raises:
        ValueError: It is the name of a file that is not there, or of no kind that is known.
    """
    path = Path(name).expanduser()
    builder = next((_BUILDERS[part[1:]] for part in reversed(path.suffixes) if part[1:] in _BUILDERS), None)
    if path.is_file():
        if builder is None:
            raise refusal(
                f"the file {name!r}",
                f"its ending {path.suffix!r} does not say how rows are written in it",
                f"Give a file that ends in {', '.join('.' + ending for ending in _BUILDERS)}.",
            )
        return {"path": builder, "data_files": str(path)} | (_read_as_text(path) if builder == "csv" else {})
    if not path.is_dir() and (builder or name.startswith((".", "/", "~"))):
        raise refusal(f"the file {name!r}", "there is no such file", "Correct the path, or give the id of a dataset.")
    return {"path": str(path) if path.is_dir() else name}


def _read_as_text(path: Path) -> dict[str, Any]:
    """Return the options that keep cells as they are written: "007" is no number here, and "NA" is not missing."""
    columns = pandas.read_csv(path, nrows=0).columns
    return {"features": Features({name: Value("string") for name in columns}), "keep_default_na": False}


def _only_split(name: str, split: str) -> str:
    """Return the split to evaluate on: the only one that a file has is called "train", whatever it is for."""
    return "train" if split == "test" and Path(name).expanduser().is_file() else split

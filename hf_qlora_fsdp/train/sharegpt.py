"""Conversations as ShareGPT wrote them: `from` and `value` where everybody else has `role` and `content`.

TRL renames these keys by itself. The speakers it leaves as they are, `human` and `gpt`, which no chat template knows:
most raise an error, and some leave the turn out. So the speakers get their names here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..translation import nearest, refusal

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


def to_messages(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row into messages.

    Args:
        example (`Mapping[str, Any]`): A row with `conversations`, or `messages`: turns with `from` and `value`, or with
            `role` and `content`.

    Raises:
        ValueError: It is no such row, or somebody speaks whom nobody knows.
    """
    turns = example.get("conversations") or example.get("messages")
    if not isinstance(turns, list):
        raise refusal(
            f"a row with the columns {', '.join(sorted(example))}",
            "a row of ShareGPT has a list of turns, conversations or messages",
            "Rename the column, or give rows of prompt and completion, messages or text, without dataset_format.",
        )
    return {"messages": [_read_turn(turn) for turn in turns]}


def _read_turn(turn: Mapping[str, Any]) -> dict[str, str]:
    speaker, words = turn.get("from") or turn.get("role"), turn.get("value", turn.get("content"))
    if speaker not in ROLES or not isinstance(words, str):
        raise refusal(
            f"a turn of a conversation with {dict(turn)!r}",
            "it has to say who speaks, and what",
            nearest(str(speaker), ROLES),
        )
    return {"role": ROLES[speaker], "content": words}

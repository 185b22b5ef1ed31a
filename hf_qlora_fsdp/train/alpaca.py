"""Rows of the Alpaca data set: an instruction, an input that may be empty, and an output.

Two ways lead from them to what TRL reads, and they train different models:

* in **Alpaca's own words** (`to_prompt_completion`), plain text with headings, as Stanford's `train.py` had it and as
  Axolotl's `type: alpaca` has it, to the letter. Right for base models;
* as a **conversation** (`to_messages`), the user says instruction and input, the assistant the output, in the chat
  template of the tokenizer. LLaMA-Factory's `formatting: alpaca` is this one.

Rows come out as prompt and completion in both, so the completion alone is trained on unless `completion_only_loss` says
otherwise. TRL ends it with the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..translation import refusal

# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT, and a newline after the last heading.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def to_prompt_completion(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row into prompt and completion, in Alpaca's words.

    Args:
        example (`Mapping[str, Any]`): `instruction`, `output`, and `input`, which may be missing or empty.

    Raises:
        ValueError: It is no such row.
    """
    instruction, addition, output = _read_row(example)
    text = WITH_INPUT if addition else WITHOUT_INPUT
    return {"prompt": text.format(instruction=instruction, input=addition), "completion": output}


def to_messages(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row into prompt and completion that are messages: user, and assistant.

    Args:
        example (`Mapping[str, Any]`): As for [`to_prompt_completion`]; and `system`, if there is such a message.

    Raises:
        ValueError: It is no such row.
    """
    instruction, addition, output = _read_row(example)
    system = [{"role": "system", "content": example["system"]}] if example.get("system") else []
    said = "\n".join(text for text in (instruction, addition) if text)
    return {
        "prompt": [*system, {"role": "user", "content": said}],
        "completion": [{"role": "assistant", "content": output}],
    }


def _read_row(example: Mapping[str, Any]) -> tuple[str, str, str]:
    row = [example.get("instruction"), example.get("input") or "", example.get("output")]
    if not all(isinstance(text, str) for text in row):
        raise refusal(
            f"a row with the columns {', '.join(sorted(example))}",
            "a row of Alpaca has the texts instruction and output, and may have input",
            "Rename the columns, or give rows of prompt and completion, messages or text, without dataset_format.",
        )
    return row[0], row[1], row[2]  # type: ignore[return-value]

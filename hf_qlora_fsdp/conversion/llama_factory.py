"""A LLaMA-Factory file, read for the run that it describes.

Most keys are transformers' own, or a table (`llama_factory_keys.py`). Here are those that take a thought: the adapter,
precision and sharding, and the data. A data set is a name in LLaMA-Factory, which `dataset_info.json` in `dataset_dir`
explains, so that file is read as well; with `dataset_dir: ONLINE` the names are those of the Hub.

Its rows are all conversations, also those of Alpaca, which become one turn of the user and one of the assistant
(`alpaca.to_messages`). What LLaMA-Factory calls `template` is its own copy of a family's chat template; here the
tokenizer's own is used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..translation import nearest, refusal, refuse_unsupported, translate_fsdp
from .foreign_keys import ForeignKeys
from .llama_factory_keys import DEFAULTS, HARMLESS, READ, REFUSED, RENAMED, TEMPLATE, UNUSED

PROGRAM = "LLaMA-Factory"
KEYS = frozenset(RENAMED) | frozenset(UNUSED) | frozenset(REFUSED) | frozenset(READ)

_ATTENTION = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
# Templates of no model family, which no tokenizer has under that name.
_GENERIC_TEMPLATES = ("default", "empty", "alpaca", "vicuna", "fewshot")
# What an entry of dataset_info.json may say, as `columns` and `tags`, and still be rows in a form that train reads.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
_OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_INFO = ("hf_hub_url", "file_name", "formatting", "subset", "split", "num_samples", "columns", "tags")


def read_llama_factory(file: dict[Any, Any]) -> tuple[dict[str, object], list[str]]:
    """Read a LLaMA-Factory file.

    Args:
        file (`dict`): What the YAML says.

    Returns:
        `tuple[dict[str, object], list[str]]`: Arguments of `hf-qlora-fsdp train`, and a note for each key that is not
            used.

    Raises:
        ValueError: A key is unknown, has no possible value, or would change the result and cannot be honoured.
    """
    keys = ForeignKeys(PROGRAM, file)
    keys.check(KEYS)
    keys.refuse(REFUSED, HARMLESS)
    for key, what in (("model_name_or_path", "the model"), ("dataset", "the data")):
        if key not in keys:
            keys.demand(key, what)
    keys.rename(RENAMED)
    for read in (_read_method, _read_precision, _read_schedule, _read_data):
        read(keys)
    keys.leave(UNUSED)
    keys.finish()
    keys.notes.append("Rows that are longer than cutoff_len lose their end; LLaMA-Factory shortens prompt and answer.")
    arguments = keys.values | {name: value for name, value in DEFAULTS.items() if name not in keys.values}
    arguments.setdefault("lora_alpha", 2 * int(str(arguments["lora_r"])))
    refuse_unsupported(defaultdict(lambda: None, {"cpu_offload_pin_memory": True} | arguments), {})
    return arguments, keys.notes


def _read_method(keys: ForeignKeys) -> None:
    for key, allowed, instead in (
        ("stage", "sft", "Write stage: sft."),
        ("finetuning_type", "lora", "Write finetuning_type: lora."),
    ):
        value = keys.take(key, allowed)
        if value != allowed:
            why = "what is here is supervised fine-tuning of an adapter on weights in 4 bits"
            raise keys.refusal(key, value, why, instead)
    bits, method = keys.take("quantization_bit"), keys.take("quantization_method", "bnb")
    if bits != 4 or method not in ("bnb", "bitsandbytes"):
        raise refusal(
            f"quantization_bit: {bits or ''} with quantization_method: {method} in a file of {PROGRAM}",
            "frozen weights are in 4 bits of bitsandbytes here",
            "Write quantization_bit: 4, and no method.",
        )
    keys.values["use_peft"] = True
    names = _split(keys.take("lora_target", "all"))
    if names == ["all"]:
        names = ["all-linear"]
    elif len(names) == 1:  # TRL makes text of a list of one, and PEFT reads text as a pattern for the whole name
        names = [rf"(.*\.)?{re.escape(names[0])}"]
    keys.values["lora_target_modules"] = names
    alpha = keys.take_number("lora_alpha", int)
    if alpha is not None:
        keys.values["lora_alpha"] = alpha
    others = _split(keys.take("additional_target", ""))
    if others:
        keys.values["lora_modules_to_save"] = others
    kernel = keys.take("flash_attn", "auto")
    if kernel not in _ATTENTION:
        raise keys.refusal("flash_attn", kernel, "there is no such attention", nearest(str(kernel), _ATTENTION))
    if _ATTENTION[kernel]:
        keys.values["attn_implementation"] = _ATTENTION[kernel]


def _read_precision(keys: ForeignKeys) -> None:
    is_said = "bf16" in keys
    bf16, fp16 = keys.take_switch("bf16"), keys.take_switch("fp16")
    if bf16 and fp16:
        raise keys.refusal("fp16", True, "bf16 is on as well, and there is one dtype", "Remove one of them.")
    if is_said and not bf16 and not fp16:
        keys.note("bf16", bf16, "without fp16, what is computed has the dtype of the checkpoint, taken for bfloat16")
    keys.values.update({"fp16": True} if fp16 else {"bf16": True})
    fsdp = translate_fsdp(keys.take("fsdp"), keys.take_mapping("fsdp_config"))
    keys.notes += fsdp.notes
    stored = keys.take_switch("disable_gradient_checkpointing")
    keys.values["gradient_checkpointing"] = keys.take_switch("gradient_checkpointing", True) and not stored
    keys.values.update(fsdp.values)


def _read_schedule(keys: ForeignKeys) -> None:
    ratio = keys.take_number("warmup_ratio")
    if ratio:
        if keys.values.get("warmup_steps"):
            raise keys.refusal("warmup_ratio", ratio, "warmup_steps says it as well", "Remove one of them.")
        keys.values["warmup_steps"] = ratio  # a number below one is a share of the steps, in transformers 5
    older = keys.take("evaluation_strategy")
    if older is not None and keys.values.setdefault("eval_strategy", older) != older:
        raise keys.refusal("evaluation_strategy", older, "eval_strategy says another", "Remove one of them.")
    if keys.take_switch("group_by_length"):
        keys.values["train_sampling_strategy"] = "group_by_length"
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if keys.values.get(name) is False:  # `no` without quotes is a switch to a YAML parser
            keys.values[name] = "no"
    size = keys.take_number("val_size")
    if size:
        if keys.values.get("eval_strategy", "no") == "no":
            why = "the rows that it holds out would never be read, as eval_strategy is no"
            raise keys.refusal("val_size", size, why, "Write eval_strategy, or remove val_size.")
        keys.values["test_split_size"] = size
    packing, neat = keys.take("packing"), keys.take_switch("neat_packing")
    if packing and not neat:
        why = "rows that are packed do not see each other here"
        raise keys.refusal("packing", packing, why, "Write neat_packing: true, or remove it.")
    if neat:
        keys.values["packing"] = True


def _read_data(keys: ForeignKeys) -> None:
    template, thinking = keys.take("template"), keys.take_switch("enable_thinking", True)
    if template in _GENERIC_TEMPLATES:
        why = "it is of no model family, and the tokenizer's own chat template is used"
        raise keys.refusal("template", template, why, "Write the template of the model's family.")
    if template is not None:
        keys.note("template", template, "the template of the model's own tokenizer is, which has to be of that family")
    if not thinking:
        raise keys.refusal("enable_thinking", thinking, *TEMPLATE)
    names, folder = _split(keys.take("dataset")), str(keys.take("dataset_dir", "data"))
    most = keys.take_number("max_samples", int)
    info = _read_info(keys, folder)
    read = [_read_dataset(keys, name, folder, info, most) for name in names]
    for form in {form for _, form in read}:
        if form != read[0][1]:
            why = "TRL makes one data set of them before it reads the rows"
            raise keys.refusal("dataset", ", ".join(names), why, "Name data sets of one form, messages or Alpaca's.")
    keys.values["datasets"] = [dataset for dataset, _ in read]
    form = read[0][1]
    trained = not keys.take_switch("train_on_prompt")
    keys.values["completion_only_loss" if form == "alpaca_chat" else "assistant_only_loss"] = trained
    if form is not None:
        keys.values["dataset_format"] = form


def _read_info(keys: ForeignKeys, folder: str) -> dict[str, Any] | None:
    """Read `dataset_info.json`, `None` if names are those of the Hub."""
    if folder == "ONLINE":
        return None
    path = Path(folder, "dataset_info.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        why = f"what its names stand for is written in {str(path)!r}, which cannot be read ({error})"
        instead = "Go to LLaMA-Factory's folder first, or write dataset_dir: FOLDER, or ONLINE for names of the Hub."
        raise keys.refusal("dataset_dir", folder, why, instead) from error


def _read_dataset(
    keys: ForeignKeys, name: str, folder: str, info: dict[str, Any] | None, most: int | None
) -> tuple[dict[str, object], str | None]:
    """Return a data set in TRL's terms, and the format of its rows."""
    if info is not None and name not in info:
        hint = nearest(name, info)
        raise keys.refusal("dataset", name, "dataset_info.json has no such name", hint)
    entry = {"hf_hub_url": name} if info is None else dict(info[name])
    for key in ("ms_hub_url", "om_hub_url"):
        if "hf_hub_url" in entry or "file_name" in entry:
            entry.pop(key, None)
    beyond = sorted(key for key, value in entry.items() if key not in _INFO and value)
    if beyond or not ("hf_hub_url" in entry or "file_name" in entry):
        why = f"dataset_info.json says {', '.join(beyond) or 'nothing of where it is'}, and train reads text alone, "
        raise keys.refusal("dataset", name, why + "from files and the Hub", "Name another data set.")
    columns, form = _read_form(keys, name, entry)
    most = min(filter(None, (most, entry.get("num_samples"))), default=None)
    split = entry.get("split", "train")
    source = entry["hf_hub_url"] if "hf_hub_url" in entry else str(Path(folder, entry["file_name"]))
    dataset: dict[str, object] = {"path": source, "columns": columns}
    if entry.get("subset"):
        dataset["name"] = entry["subset"]
    return {**dataset, "split": f"{split}[:{most}]" if most else split}, form


def _read_form(keys: ForeignKeys, name: str, entry: dict[str, Any]) -> tuple[list[str], str | None]:
    """Return the columns of a data set that are read, and the format of its rows."""
    kind, columns, tags = entry.get("formatting", "alpaca"), entry.get("columns"), entry.get("tags", {})
    if kind == "alpaca" and not tags:
        given = dict(_ALPACA if columns is None else columns)
        if all(given[key] == _ALPACA.get(key, "system") for key in given) and {"prompt", "response"} <= given.keys():
            return list(given.values()), "alpaca_chat"
    elif kind in ("sharegpt", "openai"):
        place = dict(columns or {})
        where = place.pop("messages", "conversations")
        for allowed, form in ((_OPENAI, None), (_SHAREGPT, "sharegpt")):
            given = {**_SHAREGPT, **tags}
            same = all(value == allowed.get(tag, "system") for tag, value in given.items())
            if same and not place and where in ("messages", "conversations")[: 1 if form is None else 2]:
                return [where], form
    why = f"dataset_info.json has {kind} rows of it with columns {columns} and tags {tags or None}"
    instead = "Write the data with instruction, input and output, or as messages with role and content."
    raise keys.refusal("dataset", name, why, instead)


def _split(names: object) -> list[str]:
    """Read names from a list or from text with commas."""
    several = names if isinstance(names, list) else str(names).split(",")
    return [str(name).strip() for name in several if str(name).strip()]

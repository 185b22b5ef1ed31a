"""The `datasets` of an Axolotl file, and what is trained on in them.

Axolotl's `type` says how rows become text. Here TRL does that, from rows in forms that it knows:

* `completion` rows are text, all of it trained on, and need nothing but the name of the column;
* `chat_template` rows are conversations; what the assistant says is trained on (`assistant_only_loss`), or everything
  with `train_on_inputs`. Where they are written as ShareGPT does, with `from` and `value`, `dataset_format: sharegpt`
  makes messages of them;
* `alpaca` rows are an instruction and an output, of which `dataset_format: alpaca` makes a prompt and a completion in
  Alpaca's words. The completion is trained on.

TRL concatenates datasets before it reads them, so all of a file have one form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..translation import nearest
from .axolotl_keys import HARMLESS_OF_DATASET, READ_OF_DATASET, REFUSED_OF_DATASET, UNUSED_OF_DATASET
from .foreign_keys import ForeignKeys

_TYPES = ("alpaca", "chat_template", "completion")
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
# Where a conversation lies in a row, its speaker and its words, and the format that makes messages of it.
_CONVERSATIONS = {
    ("messages", "role", "content"): None,
    ("conversations", "role", "content"): "sharegpt",
    ("messages", "from", "value"): "sharegpt",
    ("conversations", "from", "value"): "sharegpt",
}
# Who may speak, by the role that the chat template knows; `sharegpt.ROLES`, the other way round.
SPEAKERS = {"system": {"system"}, "user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "tool": {"tool"}}
# Templates of no model family: a tokenizer that is not told has another one, or none.
_GENERIC_TEMPLATES = ("chatml", "alpaca", "metharme")


def read_data(keys: ForeignKeys) -> None:
    """Take `datasets` and all that says how their rows are read.

    Raises:
        ValueError: The datasets differ in form, or have one that is not known or would be trained on in another way.
    """
    entries, all_trained = keys.take_list("datasets"), keys.take_switch("train_on_inputs")
    template = (keys.take("chat_template"), keys.take("chat_template_jinja"))
    read = [_read_dataset(keys, entry, index, template, all_trained) for index, entry in enumerate(entries)]
    if not read:
        keys.demand("datasets", "the data")
    forms = [form for _, form in read]
    for other in forms[1:]:
        if other != forms[0]:
            why = "TRL makes one data set of them before it reads the rows"
            instead = "Write all data in one form, messages with role and content."
            raise keys.refusal("datasets", f"{forms[0]} and {other}", why, instead)
    keys.values["datasets"] = [dataset for dataset, _ in read]
    keys.values.update(forms[0])
    _read_excess(keys)


def _read_excess(keys: ForeignKeys) -> None:
    """Read what happens to rows that are longer than a sequence."""
    excess = keys.take("excess_length_strategy")
    if excess not in (None, "truncate"):
        why = "rows that are longer than sequence_len are cut"
        raise keys.refusal("excess_length_strategy", excess, why, "Write truncate, or leave long rows out of the data.")
    if keys.values.get("packing") and "dataset_text_field" in keys.values:
        keys.values["packing_strategy"] = "bfd_split"  # long rows of text go on in another sequence, as in Axolotl
    elif excess is None:
        keys.notes.append(
            "Rows that are longer than sequence_len are cut; Axolotl leaves them out, or splits plain text."
        )


def _read_dataset(
    keys: ForeignKeys, entry: Any, index: int, template: tuple[Any, Any], all_trained: bool
) -> tuple[dict[str, object], dict[str, object]]:
    """Return a dataset in TRL's terms, and the arguments that say how its rows are read."""
    if not isinstance(entry, dict):
        instead = "Write - path: HUB_ID_OR_FILE and type: alpaca, chat_template or completion."
        raise keys.refusal("datasets", entry, "each of them is a mapping", instead)
    own = ForeignKeys(keys.program, entry, f"datasets[{index}]")
    own.check(READ_OF_DATASET, UNUSED_OF_DATASET, REFUSED_OF_DATASET)
    own.refuse(REFUSED_OF_DATASET, HARMLESS_OF_DATASET)
    own.leave(UNUSED_OF_DATASET)
    dataset, kind = _read_source(own), own.demand("type", "the form of the rows")
    if kind not in _TYPES:
        why = "it is a form of rows, and the forms that train reads are others"
        if kind == "input_output":
            why = "its rows say piece by piece what is trained on, and TRL trains on completions or on the assistant"
        raise own.refusal("type", kind, why, nearest(str(kind), _TYPES))
    form: dict[str, object]
    if kind == "completion":
        form = {"dataset_text_field": own.take("field", "text")}
    elif kind == "alpaca":
        form = {"dataset_format": "alpaca", "completion_only_loss": not all_trained}
    else:
        form = _read_conversation(own, all_trained)
    template = (own.take("chat_template", template[0]), own.take("chat_template_jinja", template[1]))
    form |= _read_template(own, *template, used=kind == "chat_template")
    for key in READ_OF_DATASET:
        if key in own:
            own.note(key, own.take(key), f"rows of type {kind} do not need it")
    own.finish()
    keys.notes += own.notes
    return dataset, form


def _read_source(keys: ForeignKeys) -> dict[str, object]:
    path, kind, files = keys.demand("path", "the data"), keys.take("ds_type"), keys.take("data_files")
    dataset: dict[str, object] = {"path": path}
    if kind and not files and Path(path).is_file() and Path(path).suffix not in _ENDINGS:
        dataset, files = {"path": kind}, path
    elif kind and Path(path).suffix not in _ENDINGS:
        keys.note("ds_type", kind, "no file lies there without an ending, and datasets tells the type of others itself")
    if files:
        dataset["data_files"] = files
    if "name" in keys:
        dataset["name"] = keys.take("name")
    return {**dataset, "split": keys.take("split", "train")}


def _read_conversation(keys: ForeignKeys, all_trained: bool) -> dict[str, object]:
    names = {"role": "role", "content": "content"} | keys.take_mapping("message_property_mappings")
    for key, name in (("message_field_role", "role"), ("message_field_content", "content")):
        names[name] = keys.take(key, names[name])
    place = (keys.take("field_messages", "messages"), names.pop("role"), names.pop("content"))
    if names or place not in _CONVERSATIONS:
        given = f"{place[0]}, with {place[1]}, {place[2]}" + "".join(f" and {name}" for name in names)
        why = "train reads conversations of role and content, or of from and value"
        raise keys.refusal("field_messages", given, why, "Write the data in one of these forms.")
    roles = keys.take("roles_to_train", ["assistant"])
    if not all_trained and roles not in ("assistant", ["assistant"], ["gpt"], ["assistant", "gpt"]):
        why = "what is trained on is what the assistant says, or everything"
        raise keys.refusal("roles_to_train", roles, why, "Remove it, or write train_on_inputs: true.")
    for key in ("train_on_eos", "train_on_eot"):
        where = keys.take(key, "turn")
        if not all_trained and where != "turn":
            why = "the end of each turn that is trained on is trained on"
            raise keys.refusal(key, where, why, "Remove it, or write turn.")
    form: dict[str, object] = {"assistant_only_loss": not all_trained}
    renamed = _read_speakers(keys)
    if renamed or _CONVERSATIONS[place]:
        form["dataset_format"] = "sharegpt"
    return form


def _read_speakers(keys: ForeignKeys) -> bool:
    """Take `roles`, and return whether somebody speaks under another name than that of the role."""
    roles, renamed = keys.take_mapping("roles"), False
    for role, speakers in roles.items():
        names = speakers if isinstance(speakers, list) else [speakers]
        if not SPEAKERS.get(role, set()).issuperset(names):
            why = "who speaks is known by these names alone: " + ", ".join(sorted(set().union(*SPEAKERS.values())))
            raise keys.refusal("roles", roles, why, "Write the data with the roles system, user, assistant and tool.")
        renamed |= any(name != role for name in names)
    return renamed


def _read_template(keys: ForeignKeys, name: Any, jinja: Any, used: bool) -> dict[str, object]:
    """Return the argument for a chat template, none where the tokenizer's own is meant."""
    if name is None and jinja is None:
        return {}
    if not used:
        keys.note("chat_template", name or jinja, "the rows are no conversations, and the tokenizer keeps its own")
        return {}
    if jinja is not None and name not in (None, "jinja"):
        keys.note("chat_template_jinja", jinja, f"chat_template is {name}")
    elif jinja is not None:
        if not str(jinja).endswith((".jinja", ".j2")):
            why = "TRL reads templates from files"
            instead = "Save it to template.jinja, and write chat_template_jinja: template.jinja."
            raise keys.refusal("chat_template_jinja", jinja, why, instead)
        return {"chat_template_path": jinja}
    if name in _GENERIC_TEMPLATES or name == "jinja":
        why = "Axolotl has its own text for it, and the tokenizer's may be another"
        instead = "Save the template to template.jinja, and write chat_template_jinja: template.jinja; or remove it."
        raise keys.refusal("chat_template", name, why, instead)
    if name != "tokenizer_default":
        keys.note("chat_template", name, "the template of the model's own tokenizer is, which has to be of that family")
    return {}

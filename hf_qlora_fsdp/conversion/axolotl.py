"""An Axolotl file, read for the run that it describes.

Most keys are a table (`axolotl_keys.py`). Here are those that take a thought, each function a subject: precision and
attention, the adapter and the frozen weights, sharding and what is recomputed, the model and its tokens, trackers. Data
have a room of their own (`axolotl_data.py`), and so has what is done step by step (`axolotl_steps.py`).

Three things differ from Axolotl where no key asks for it, and are said in a note. Rows longer than `sequence_len` are
cut, Axolotl leaves them out. The loss is the mean over the tokens of all ranks, Axolotl's is a mean of the ranks'
means. And of the warm-up that Axolotl takes by default, 3 % of the steps and at most 100, the limit is left away: what
it would be is not known before the data is read.
"""

from __future__ import annotations

import re
from typing import Any

from ..translation import nearest, parse_bool, refusal, translate_fsdp
from .axolotl_data import read_data
from .axolotl_keys import DEFAULTS, HARMLESS, LORA, OTHER_MODEL, READ, REFUSED, RENAMED, UNUSED
from .axolotl_steps import read_batches, read_saving, read_schedule
from .foreign_keys import ForeignKeys

PROGRAM = "Axolotl"
KEYS = frozenset(RENAMED) | frozenset(UNUSED) | frozenset(REFUSED) | frozenset(READ)

_ATTENTION_FLAGS = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Plugins that change no result, each with one of its keys that say why.
_PLUGINS = {
    "cut_cross_entropy": "cut_cross_entropy",
    "liger": "liger_rms_norm",
    "kernels": "use_scattermoe",
    "lm_eval": "lm_eval_tasks",
    "swanlab": "swanlab_project",
}
_TRACKERS = {
    "use_wandb": "wandb",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
    "use_swanlab": "swanlab",
}


def read_axolotl(file: dict[Any, Any]) -> tuple[dict[str, object], list[str]]:
    """Read an Axolotl file.

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
    _check_adapter(keys)
    for key, what in (
        ("base_model", "the model"),
        ("datasets", "the data"),
        ("learning_rate", "the learning rate"),
        ("lora_r", "the rank of the adapter"),
        ("lora_alpha", "the scale of the adapter"),
    ):
        if key not in keys:
            keys.demand(key, what)
    keys.rename(RENAMED)
    for read in (_read_model, _read_precision, _read_adapter, _read_quantization, _read_sharding, read_data):
        read(keys)
    for read in (read_batches, read_schedule, read_saving, _read_trackers):
        read(keys)
    keys.leave(UNUSED)
    keys.finish()
    keys.notes.append("The loss is the mean over the tokens of all ranks; Axolotl's is a mean of the ranks' means.")
    return keys.values | {name: value for name, value in DEFAULTS.items() if name not in keys.values}, keys.notes


def _check_adapter(keys: ForeignKeys) -> None:
    adapter, in_4bit = keys.take("adapter"), keys.take_switch("load_in_4bit")
    if adapter not in ("qlora", "lora") or not in_4bit:
        raise refusal(
            f"adapter: {adapter or ''} with load_in_4bit: {str(in_4bit).lower()} in a file of {PROGRAM}",
            "the base model is frozen in 4 bits here, and an adapter is what is trained",
            "Write adapter: qlora and load_in_4bit: true.",
        )


def _read_adapter(keys: ForeignKeys) -> None:
    keys.values["use_peft"] = True
    if not keys.take_switch("peft_autocast_adapter_dtype", True):
        why = "what is trained is float32, whatever the base model is"
        raise keys.refusal("peft_autocast_adapter_dtype", False, why, "Remove it.")
    weights = keys.take("peft_init_lora_weights", True)
    if weights is not True:
        raise keys.refusal("peft_init_lora_weights", weights, *LORA)
    names, every = keys.take_list("lora_target_modules"), keys.take_switch("lora_target_linear")
    if every:
        beyond = [name for name in names if re.search("lm_head|embed", str(name))]
        if beyond:
            why = "lora_target_linear means the linear layers of the decoder, and these are others"
            raise keys.refusal("lora_target_modules", beyond, why, "Name all modules, and remove lora_target_linear.")
        names = ["all-linear"]
    elif len(names) == 1 and re.fullmatch(r"[\w.]+", str(names[0])):
        # TRL makes text of a list of one, and PEFT reads text as a pattern for the whole name.
        names = [rf"(.*\.)?{re.escape(str(names[0]))}"]
    if not names and "lora_target_parameters" not in keys.values:
        keys.demand("lora_target_modules", "what is adapted")
    if names:
        keys.values["lora_target_modules"] = [str(name) for name in names]


def _read_quantization(keys: ForeignKeys) -> None:
    dtype = "float16" if keys.values.get("fp16") else "bfloat16" if keys.values["bf16"] else "float32"
    known = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    for name, value in keys.take_mapping("bnb_config_kwargs").items():
        key = f"bnb_config_kwargs.{name}"
        if name in known:
            keys.values[name] = value
        elif name == "bnb_4bit_quant_storage":
            keys.note(key, value, "packed bytes are stored under the dtype of the computation")
        elif name not in ("bnb_4bit_compute_dtype", "load_in_4bit"):
            raise keys.refusal(key, value, "it acts in transformers' loader only", nearest(name, known))
        elif str(value).removeprefix("torch.") not in (dtype, "True"):
            raise keys.refusal(key, value, f"weights are in 4 bits, and bf16 and fp16 say {dtype}", "Remove it.")


def _read_precision(keys: ForeignKeys) -> None:
    bf16, fp16 = keys.take("bf16", "auto"), keys.take_switch("fp16") | keys.take_switch("float16")
    word = str(bf16).strip().lower()
    if word == "full":
        keys.note("bf16", bf16, "evaluation computes in the parameter dtype as training does; it is read as true")
    asked = word in ("auto", "full") or parse_bool(keys.say("bf16", bf16), bf16)
    bf16 = keys.take_switch("bfloat16") or (asked and not (fp16 and word == "auto"))
    if fp16 and bf16:
        raise keys.refusal("fp16", True, "bf16 is on as well, and there is one dtype", "Remove one of them.")
    keys.values.update({"fp16": True} if fp16 else {"bf16": bf16})
    tf32 = keys.take("tf32")
    if str(tf32).lower() == "auto":
        keys.note("tf32", tf32, "products are computed in 16 bits, and PyTorch's setting stays as it is for the rest")
    elif tf32 is not None:
        keys.values["tf32"] = parse_bool(keys.say("tf32", tf32), tf32)
    for chosen in _chosen_attention(keys):
        if chosen not in _ATTENTION and "/" not in str(chosen):
            why = "transformers has no such attention"
            raise keys.refusal("attn_implementation", chosen, why, nearest(str(chosen), _ATTENTION))
        if keys.values.setdefault("attn_implementation", chosen) != chosen:
            why = f"another key asks for {keys.values['attn_implementation']!r}"
            raise keys.refusal("attn_implementation", chosen, why, "Remove one of them.")


def _chosen_attention(keys: ForeignKeys) -> list[object]:
    chosen = [keys.take("attn_implementation")] if "attn_implementation" in keys else []
    return chosen + [name for flag, name in _ATTENTION_FLAGS.items() if keys.take_switch(flag)]


def _read_sharding(keys: ForeignKeys) -> None:
    """Read FSDP in either generation, and what is recomputed in the backward pass."""
    options = keys.take_mapping("fsdp_config")
    for key, name in (("fsdp_version", "version"), ("fsdp_final_state_dict_type", "final_state_dict_type")):
        if key in keys:
            options[name] = keys.take(key)
    fsdp = translate_fsdp(keys.take("fsdp"), options)
    keys.notes += fsdp.notes
    recompute = keys.take("gradient_checkpointing", False)
    offload = keys.take("activation_offloading", False)
    if recompute in ("offload", "offload_disk"):
        offload, recompute = offload or ("disk" if recompute == "offload_disk" else True), True
    if offload not in (False, True, "legacy"):
        keys.note("activation_offloading", offload, "activations go to host memory; it is read as true")
    recompute = parse_bool(keys.say("gradient_checkpointing", recompute), recompute)
    keys.values["gradient_checkpointing"] = recompute
    keys.values.update(fsdp.values)
    if offload:
        keys.values["activation_offloading"] = True
    if "selective_checkpointing" in keys:
        why = "each layer is recomputed as a whole, with the same result"
        keys.note("selective_checkpointing", keys.take("selective_checkpointing"), why)


def _read_model(keys: ForeignKeys) -> None:
    options = keys.take_mapping("model_config") | keys.take_mapping("overrides_of_model_config")
    for name, value in options.items():
        if name != "output_router_logits":
            raise keys.refusal(f"model_config.{name}", value, *OTHER_MODEL)
        if parse_bool(keys.say("model_config.output_router_logits", value), value):
            why = "TRL adds the router's loss to the model's, with the factor of the model's own configuration"
        else:
            keys.values["router_aux_loss_coef"], why = 0.0, "router_aux_loss_coef=0.0 says it"
        keys.note(f"model_config.{name}", value, why)
    for plugin in keys.take_list("plugins"):
        name = str(plugin).removeprefix("axolotl.integrations.").split(".")[0]
        if name not in _PLUGINS:
            why = "it changes how Axolotl trains, and nothing here does the same"
            raise keys.refusal("plugins", plugin, why, "Remove it.")
        keys.note("plugins", plugin, UNUSED[_PLUGINS[name]])
    for name, token in keys.take_mapping("special_tokens").items():
        if token is None or token == []:
            continue
        if name not in ("pad_token", "eos_token"):
            why = "it changes the tokenizer"
            instead = "Remove it if the tokenizer has it already; else save a tokenizer that has, with the model."
            raise keys.refusal(f"special_tokens.{name}", token, why, instead)
        keys.values[name] = token


def _read_trackers(keys: ForeignKeys) -> None:
    project = keys.take("wandb_project")
    if project:
        keys.note("wandb_project", project, f"set WANDB_PROJECT={project} in the environment")
    asked = {key: keys.take_switch(key) for key in _TRACKERS}
    asked["use_wandb"] |= bool(project)
    if any(asked.values()):
        keys.values["report_to"] = [_TRACKERS[key] for key in _TRACKERS if asked[key]]
    for key, tracker in (
        ("wandb_name", "use_wandb"),
        ("mlflow_run_name", "use_mlflow"),
        ("trackio_run_name", "use_trackio"),
    ):
        name = keys.take(key)
        if name and asked[tracker] and "run_name" not in keys.values:
            keys.values["run_name"] = name
        elif name:
            keys.note(key, name, f"{tracker} is off, or another key has named the run")
    repository = keys.take("hub_model_id")
    if repository:
        keys.values.update(push_to_hub=True, hub_model_id=repository, hub_private_repo=True, hub_always_push=True)

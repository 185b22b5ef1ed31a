"""An Axolotl file, read for the run that it describes.

Most keys are a table (`axolotl_keys.py`). Here are those that take a thought, each function a subject: the adapter,
precision and attention, sharding and what is recomputed, batches and schedule, saving and evaluating, data, trackers.

Three things differ from Axolotl where no key asks for it, and are said in a note. Rows longer than `sequence_len` are
cut, Axolotl leaves them out. The loss is the mean over the tokens of all ranks, Axolotl's is a mean of the ranks'
means. And of the warm-up that Axolotl takes by default, 3 % of the steps and at most 100, the limit is left away: what
it would be is not known before the data is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from ..translation import nearest, parse_bool, refuse_unsupported, translate_fsdp
from .axolotl_data import read_data
from .axolotl_keys import DEFAULTS, HARMLESS, LORA, OTHER_MODEL, READ, REFUSED, RENAMED, UNUSED
from .foreign_keys import ForeignKeys

PROGRAM = "Axolotl"
KEYS = frozenset(RENAMED) | frozenset(UNUSED) | frozenset(REFUSED) | frozenset(READ)

# Those of transformers that act on each parameter alone and keep their states as the parameter is, sharded.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "sgd", "adagrad", "rmsprop")
# Those of transformers that need nothing but the number of steps, and `lr_scheduler_kwargs` for the last ones.
SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
    *("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
)
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
    for read in (_read_model, _read_adapter, _read_precision, _read_sharding, read_data, _read_batches, _read_schedule):
        read(keys)
    _read_saving(keys)
    _read_trackers(keys)
    keys.leave(UNUSED)
    keys.finish()
    keys.notes.append("The loss is the mean over the tokens of all ranks; Axolotl's is a mean of the ranks' means.")
    return keys.values | {name: value for name, value in DEFAULTS.items() if name not in keys.values}, keys.notes


def _read_adapter(keys: ForeignKeys) -> None:
    adapter, in_4bit = keys.take("adapter"), keys.take_switch("load_in_4bit")
    if adapter not in ("qlora", "lora") or not in_4bit:
        given = f"{adapter!r} with load_in_4bit: {str(in_4bit).lower()}"
        why = "the base model is frozen in 4 bits here, and an adapter is what is trained"
        raise keys.refusal("adapter", given, why, "Write adapter: qlora and load_in_4bit: true.")
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
    known = {"bnb_4bit_quant_type": "bnb_4bit_quant_type", "bnb_4bit_use_double_quant": "bnb_4bit_use_double_quant"}
    for name, value in keys.take_mapping("bnb_config_kwargs").items():
        if name in known:
            keys.values[known[name]] = value
        elif name in ("load_in_4bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            keys.note(
                f"bnb_config_kwargs.{name}", value, "it follows from bf16 and fp16, or packed bytes are corrupted"
            )
        else:
            hint = nearest(name, known)
            raise keys.refusal(f"bnb_config_kwargs.{name}", value, "it acts in transformers' loader only", hint)


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
    chosen = keys.take("attn_implementation")
    for flag, name in _ATTENTION_FLAGS.items():
        if keys.take_switch(flag):
            chosen = chosen or name
    if chosen is None:
        return
    if chosen not in _ATTENTION and "/" not in str(chosen):
        why = "transformers has no such attention"
        raise keys.refusal("attn_implementation", chosen, why, nearest(str(chosen), _ATTENTION))
    keys.values["attn_implementation"] = chosen


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


def _read_batches(keys: ForeignKeys) -> None:
    micro, steps, total = (
        keys.take_number(key, int) for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size")
    )
    if total and steps and not micro:
        micro = total // steps
    elif total and micro and not steps:
        steps = total // micro
    elif total and total != (micro or 1) * (steps or 1):
        why = f"it is micro_batch_size times gradient_accumulation_steps, {micro or 1} times {steps or 1}"
        raise keys.refusal("batch_size", total, why, "Remove batch_size.")
    keys.values["per_device_train_batch_size"] = micro or 1
    keys.values["gradient_accumulation_steps"] = steps or 1
    keys.values["per_device_eval_batch_size"] = keys.take_number("eval_batch_size", int, micro or 1)
    if keys.take_switch("group_by_length"):
        keys.values["train_sampling_strategy"] = "group_by_length"
    if keys.values.get("packing"):
        keys.values["shuffle_dataset"] = keys.take_switch("shuffle_merged_datasets", True)
    elif not keys.take_switch("shuffle_merged_datasets", True):
        why = "the trainer draws rows in a random order"
        raise keys.refusal("shuffle_merged_datasets", False, why, "Remove it.")


def _read_schedule(keys: ForeignKeys) -> None:
    optim = str(keys.take("optimizer", "adamw_torch_fused"))
    if optim == "adamw_hf":
        keys.note("optimizer", optim, "transformers 5 has no AdamW of its own; PyTorch's, which computes the same, is")
        optim = "adamw_torch"
    try:
        refuse_unsupported(defaultdict(lambda: None, optim=optim, cpu_offload_pin_memory=True), {})
    except ValueError as error:
        raise ValueError(f"{keys.say('optimizer', optim)} is optim={optim!r} here. {error}") from error
    if optim not in OPTIMIZERS:
        why = "it is not known to work on sharded parameters, or not in transformers"
        raise keys.refusal("optimizer", optim, why, nearest(optim, OPTIMIZERS))
    keys.values["optim"] = optim
    extra = keys.take("optim_args")
    if extra:
        pairs = extra.items() if isinstance(extra, dict) else ()
        keys.values["optim_args"] = ",".join(f"{name}={value}" for name, value in pairs) or str(extra)
    schedule, options = str(keys.take("lr_scheduler", "cosine")), keys.take_mapping("lr_scheduler_kwargs")
    least = keys.take_number("cosine_min_lr_ratio")
    if least is not None and schedule == "cosine":
        schedule, options = "cosine_with_min_lr", {**options, "min_lr_rate": least}
    elif least is not None:
        raise keys.refusal("cosine_min_lr_ratio", least, f"lr_scheduler is {schedule!r}", "Remove it.")
    if schedule not in SCHEDULES:
        why = "transformers has no such schedule, or it needs more than a file can say"
        raise keys.refusal("lr_scheduler", schedule, why, nearest(schedule, SCHEDULES))
    keys.values["lr_scheduler_type"] = schedule
    if options:
        keys.values["lr_scheduler_kwargs"] = options
    ratio, steps = keys.take_number("warmup_ratio"), keys.take_number("warmup_steps", int)
    if ratio is not None and steps is not None:
        raise keys.refusal("warmup_ratio", ratio, "warmup_steps says it as well", "Remove one of them.")
    if ratio is not None and not 0 <= ratio < 1:
        raise keys.refusal("warmup_ratio", ratio, "it is a share of the steps", "Write a number from 0 to below 1.")
    if steps is None and ratio is None:
        keys.notes.append("Without warmup_steps: 3 % of the steps, which Axolotl cuts at 100 steps.")
    # A number below one is a share of the steps, in transformers 5.
    keys.values["warmup_steps"] = steps if steps is not None else 0.03 if ratio is None else ratio


def _read_saving(keys: ForeignKeys) -> None:
    """Read when to save and when to evaluate; a number below one is a share of all steps."""
    size = keys.take_number("val_set_size", float, 0.0)
    _read_interval(keys, "save", "saves_per_epoch", keys.take("save_strategy", "epoch"))
    older = keys.take("evaluation_strategy", "epoch")
    strategy = keys.take("eval_strategy", older)
    if size:
        keys.values["test_split_size"] = size
        _read_interval(keys, "eval", "evals_per_epoch", strategy)
        if keys.values["eval_strategy"] == "no":
            why = "the rows that it holds out would never be read, as eval_strategy is no"
            raise keys.refusal("val_set_size", size, why, "Remove one of them.")
        keys.values["eval_on_start"] = True
    else:
        for key in ("eval_steps", "evals_per_epoch"):
            if key in keys:
                keys.note(key, keys.take(key), "val_set_size is 0, so there is nothing to evaluate on")
        keys.values["eval_strategy"] = "no"


def _read_interval(keys: ForeignKeys, verb: str, per_epoch: str, strategy: object) -> None:
    steps, times = keys.take_number(f"{verb}_steps"), keys.take_number(per_epoch)
    epochs: Any = keys.values.get("num_train_epochs", DEFAULTS["num_train_epochs"])
    if steps and times:
        raise keys.refusal(per_epoch, times, f"{verb}_steps says it as well", "Remove one of them.")
    if times and times * epochs <= 1:
        strategy = "epoch"
    elif times:
        steps = 1 / (times * epochs)
    if steps:
        strategy, keys.values[f"{verb}_steps"] = "steps", int(steps) if steps >= 1 else steps
    if strategy is False:  # `no` without quotes is a switch to a YAML parser
        strategy = "no"
    if strategy not in ("no", "epoch", "steps"):
        why = "it is none that needs no more than a file says"
        raise keys.refusal(f"{verb}_strategy", strategy, why, "Write steps, epoch or no.")
    keys.values[f"{verb}_strategy"] = strategy


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
    for key, tracker in (("wandb_name", "use_wandb"), ("mlflow_run_name", "use_mlflow")):
        name = keys.take(key)
        if name and asked[tracker]:
            keys.values["run_name"] = name
    name = keys.take("trackio_run_name")
    if name and asked["use_trackio"]:
        keys.values["run_name"] = name
    repository = keys.take("hub_model_id")
    if repository:
        keys.values.update(push_to_hub=True, hub_model_id=repository, hub_private_repo=True, hub_always_push=True)

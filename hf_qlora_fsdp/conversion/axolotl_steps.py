"""What an Axolotl file says of the steps: how many rows one takes, at which rate, and when to save and to evaluate.

Where Axolotl counts times an epoch, transformers has a share of all steps, and `epoch` for once. What a file says in
two ways has to agree.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ..translation import nearest, refuse_unsupported
from .axolotl_keys import DEFAULTS
from .foreign_keys import ForeignKeys

# Those of transformers that act on each parameter alone and keep their states as the parameter is, sharded.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "sgd", "adagrad", "rmsprop")
# Those of transformers that need nothing but the number of steps, and `lr_scheduler_kwargs` for the last ones.
SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
    *("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
)


def read_batches(keys: ForeignKeys) -> None:
    """Take the rows of a step on each rank, and their order.

    Raises:
        ValueError: Two keys contradict each other, or rows are to be taken in their own order.
    """
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
    micro, steps = (1 if number is None else number for number in (micro, steps))
    keys.values["per_device_train_batch_size"] = micro
    keys.values["gradient_accumulation_steps"] = steps
    keys.values["per_device_eval_batch_size"] = keys.take_number("eval_batch_size", int, micro)
    if keys.take_switch("group_by_length"):
        keys.values["train_sampling_strategy"] = "group_by_length"
    if keys.values.get("packing"):
        keys.values["shuffle_dataset"] = keys.take_switch("shuffle_merged_datasets", True)
    elif not keys.take_switch("shuffle_merged_datasets", True):
        why = "the trainer draws rows in a random order"
        raise keys.refusal("shuffle_merged_datasets", False, why, "Remove it.")


def read_schedule(keys: ForeignKeys) -> None:
    """Take the optimizer, and how the learning rate goes.

    Raises:
        ValueError: One of them is not there, or cannot work on sharded parameters.
    """
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


def read_saving(keys: ForeignKeys) -> None:
    """Take when to save and when to evaluate; a number below one is a share of all steps.

    Raises:
        ValueError: Two keys contradict each other, or rows are held out and never read.
    """
    size = keys.take_number("val_set_size", float, 0.0)
    _read_interval(keys, "save", "saves_per_epoch", ["save_strategy"])
    if size:
        keys.values["test_split_size"] = size
        _read_interval(keys, "eval", "evals_per_epoch", ["eval_strategy", "evaluation_strategy"])
        if keys.values["eval_strategy"] == "no":
            why = "the rows that it holds out would never be read, as eval_strategy is no"
            raise keys.refusal("val_set_size", size, why, "Remove one of them.")
        keys.values["eval_on_start"] = True
    else:
        for key in ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"):
            value = keys.take(key)
            if value not in (None, False, "no"):
                keys.note(key, value, "val_set_size is 0, so there is nothing to evaluate on")
        keys.values["eval_strategy"] = "no"


def _read_interval(keys: ForeignKeys, verb: str, per_epoch: str, spellings: list[str]) -> None:
    """Read how often, in one of the ways there are: so many steps, so many times an epoch, or a strategy."""
    steps, times = keys.take_number(f"{verb}_steps"), keys.take_number(per_epoch)
    epochs: Any = keys.values.get("num_train_epochs", DEFAULTS["num_train_epochs"])
    if steps and times:
        raise keys.refusal(per_epoch, times, f"{verb}_steps says it as well", "Remove one of them.")
    strategy = "steps" if steps or (times and times * epochs > 1) else "epoch"
    for key in [key for key in spellings if key in keys]:
        asked = keys.take(key)
        asked = "no" if asked is False else asked  # `no` without quotes is a switch to a YAML parser
        if asked not in ("no", "epoch", "steps"):
            why = "it is none that needs no more than a file says"
            raise keys.refusal(key, asked, why, "Write steps, epoch or no.")
        if (steps or times) and asked not in ("steps", strategy):
            why = f"{verb}_steps or {per_epoch} says how often"
            raise keys.refusal(key, asked, why, "Remove one of them.")
        strategy = strategy if steps or times else asked
    if steps or (times and times * epochs > 1):
        every = steps or 1 / (times * epochs)
        keys.values[f"{verb}_steps"] = int(every) if every >= 1 else every
    keys.values[f"{verb}_strategy"] = strategy

"""Numbers that no run can have: a rank of zero, a rate below it, half a row to hold out.

Upstream reads some of them as "not given" (`max_steps=0` trains whole epochs, `save_total_limit=-1` keeps all), others
train on without an effect (`lora_alpha=0`) or away from the data (`learning_rate=-1e-4`), and the rest fail when the
model has been loaded. Here each is an error before any process is started.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..translation import refusal

_FROM_1 = "Write 1 or more."
_FROM_0 = "Write 0 or more."
_SHARE = "Write a number from 0 to below 1."
_EVERY = (
    "it is a number of steps, or, below 1, a share of all of them",
    "Write 1 or more, or a share such as 0.1; to do without, write no for the strategy.",
)


def _is_positive(number: float) -> bool:
    return number > 0 and math.isfinite(number)


def _is_share(number: float) -> bool:
    return 0 <= number < 1


# Names, whether a number is one for them, what it stands for, and what to write instead.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("lora_r", lambda n: n >= 1, "it is the rank of the adapter", _FROM_1),
    ("lora_alpha", lambda n: n >= 1, "what the adapter adds is multiplied by it", _FROM_1),
    ("lora_dropout", _is_share, "it is a share of what enters the adapter", _SHARE),
    (
        "per_device_train_batch_size per_device_eval_batch_size",
        lambda n: n >= 1,
        "it is the number of rows that a rank takes at once",
        _FROM_1,
    ),
    ("gradient_accumulation_steps", lambda n: n >= 1, "it is the number of batches in a step", _FROM_1),
    ("max_length", lambda n: n >= 2, "each token is learned from those before it in a row", "Write 2 or more."),
    ("dataset_num_proc", lambda n: n >= 1, "it is the number of processes that prepare the rows", _FROM_1),
    (
        "pad_to_multiple_of",
        lambda n: n == "auto" or (isinstance(n, int) and n >= 1),
        "rows are made as long as a multiple of it",
        "Write 1 or more, or auto.",
    ),
    ("num_train_epochs", _is_positive, "it is how often all rows are seen", "Write a number above 0."),
    (
        "max_steps",
        lambda n: n >= 1 or n == -1,
        "it is the number of steps, and upstream takes it for none given",
        "Write 1 or more, or leave it out for num_train_epochs.",
    ),
    (
        "learning_rate",
        _is_positive,
        "weights move against the gradient, by a part of it",
        "Write a number above 0, such as 1e-4.",
    ),
    ("adam_beta1 adam_beta2 label_smoothing_factor", _is_share, "it is a share", _SHARE),
    (
        "weight_decay max_grad_norm adam_epsilon neftune_noise_alpha router_aux_loss_coef",
        lambda n: n >= 0,
        "it is a size, which has no sign",
        _FROM_0,
    ),
    ("warmup_steps", lambda n: n >= 0, "it is a number of steps, or, below 1, a share of all", _FROM_0),
    ("seed data_seed dataloader_num_workers", lambda n: n >= 0, "there is none below 0", _FROM_0),
    ("logging_steps save_steps eval_steps", _is_positive, *_EVERY),
    (
        "save_total_limit",
        lambda n: n >= 1,
        "it is the number of checkpoints to keep, and a run goes on from the newest",
        "Write 1 or more, or leave it out to keep all.",
    ),
    (
        "test_split_size",
        lambda n: n > 0 and (n < 1 or n == int(n)),
        "it is a share of the rows, or a whole number of them",
        "Write a share such as 0.1, or 1 or more rows.",
    ),
)


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse numbers that cannot be.

    Args:
        values (`Mapping[str, Any]`): Options of `hf-qlora-fsdp train` that were given, by name.
    Raises:
        ValueError: One of them is out of its range.
    """
    for names, is_possible, meaning, instead in _RANGES:
        for name in names.split():
            number = values.get(name)
            if number is not None and not is_possible(number):
                raise refusal(f"{name}={number}", meaning, instead)

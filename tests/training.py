"""Short training runs for the trainer's tests: the same few arguments everywhere, and what is worth comparing.

`ours` and `stock` run on a rank and return a [`Run`]: losses and gradient norms of every step, and the adapter whole,
by PEFT's names. `stock` is the reference that owes nothing to this package: plain `SFTTrainer`, bitsandbytes and PEFT
in one process, the model whole.

TRL casts trainable weights of quantised models to bfloat16. The reference puts the float32 masters back, because what
is compared is the sharding, and test_seams.py holds the cast itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from tests.distributed import RankPool

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@functools.cache
def alone() -> RankPool:
    """One rank that the session shares, for what must run in a process group of one, or in none that matters."""
    pool = RankPool(world_size=1)
    atexit.register(pool.close)
    return pool


@dataclass
class Run:
    """What a training run left behind on one rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def arguments(folder: str, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a short run. A high, constant learning rate, so that a wrong gradient shows at once."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": 3,
    } | changes


def ours(
    model: Any, dataset: Dataset, changes: dict[str, Any], peft: dict[str, Any] | None = None, **named: Any
) -> Any:
    """Make a `QLoRAFSDPTrainer` with the usual arguments and the changes given."""
    from peft import LoraConfig

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    peft_config = None if peft == {} else LoraConfig(**(LORA | (peft or {})))
    args = QLoRAFSDPConfig(**arguments(**changes))
    return QLoRAFSDPTrainer(model, args=args, train_dataset=dataset, peft_config=peft_config, **named)


def stock(
    folder: str,
    dataset: Dataset,
    changes: dict[str, Any],
    dtype: torch.dtype,
    peft: dict[str, Any] | None = None,
    device: str = "cpu",
    model: Any = None,
    **named: Any,
) -> Any:
    """Make a plain `SFTTrainer` with float32 masters on a plain 4-bit model, or on the model given."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # or accelerate would wrap the model in DDP; the pool puts them back
    model = model or plain_model(folder, dtype, device)
    args = SFTConfig(**arguments(**{"bf16": dtype == torch.bfloat16} | changes))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(**(LORA | (peft or {}))),
        **named,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def plain_model(folder: str, dtype: torch.dtype, device: str = "cpu", **quantization: Any) -> Any:
    """Load a model in 4 bits as anybody does."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        | quantization
    )
    options = {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Gather the trained tensors whole, by their own names less PEFT's `default`. A collective."""
    from hf_qlora_fsdp.export import trainable_parameters

    whole = {}
    for name, parameter in trainable_parameters(model).items():
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        whole[name.replace(".default.", ".")] = value.cpu().clone()
    return whole


def fill_adapter(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Put given values into the trained tensors of a model that is not sharded."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = values[name.replace(".default.", ".")].to(parameter.dtype)


def run(trainer: Any, **named: Any) -> Run:
    """Train, and keep what is worth comparing."""
    trainer.train(**named)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        [entry["loss"] for entry in steps],
        [entry["grad_norm"] for entry in steps],
        adapter_of(trainer.model),
        trainer.state.log_history,
    )


# Two rows of `equal_rows`, less the first token of each, which nothing predicts.
TOKENS_A_STEP = 46


def equal_rows(num_rows: int) -> Dataset:
    """Return rows of one length, so that a batch of two has no padding and every rank as many tokens as the others."""
    generator = torch.Generator().manual_seed(5)
    return Dataset.from_list(
        [{"input_ids": torch.randint(5, 261, (24,), generator=generator).tolist()} for _ in range(num_rows)]
    )


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what the package logs on this rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_qlora_fsdp")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def refusal(fn: Callable[..., Any], *args: Any, **named: Any) -> tuple[str, str]:
    """Call a function that must refuse, and return the name and the text of its exception.

    On a rank, where an exception that leaves the job would cost the pool its processes.
    """
    try:
        fn(*args, **named)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", "it went through"

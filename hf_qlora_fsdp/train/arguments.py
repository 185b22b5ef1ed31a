"""What can be written for `hf-qlora-fsdp train`: the fields of TRL's dataclasses and of ours, each with one home.

A file for `trl sft --config` is a file for this command: the names are those of TRL's dataclasses for script, data
mixture and model, and of ours for the training. What they offer and sharded 4-bit weights settle (`load_in_4bit`,
`dtype`, the storage dtype) is what happens anyway, or refused. How they are read is `command_line.py`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from ..config import QLoRAFSDPConfig
from ..sharding import check_storage_dtype
from ..translation import refusal


@dataclass
class RunArguments:
    """How the command itself goes about it."""

    _argument_group_name: ClassVar[str] = "this command"

    nproc: str = field(
        default="auto",
        metadata={
            "help": "Processes to start: a number, or 'auto' for one a GPU, two without any. Under torchrun, "
            "`accelerate launch` and srun there are processes already."
        },
    )
    plot: str | None = field(
        default=None, metadata={"help": "Draw the curves of loss and memory into this PNG; needs matplotlib."}
    )


@dataclass
class DataArguments(ScriptArguments):
    """TRL's, for one dataset. What it would ignore beside a mixture is refused there."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, file (.json, .jsonl, .parquet, .csv, .txt) or folder of files to train on."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset on the Hub (`name` of `load_dataset`)."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; a part of one as well, as in 'train[:1000]'."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows while training, instead of before. Needs `max_steps`."}
    )
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "Refused: it mends DDP."})
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "What rows are turned into prompt and completion or messages first: those of Alpaca in its own "
            "words ('alpaca') or as a conversation ('alpaca_chat'), or conversations as in ShareGPT ('sharegpt').",
            "choices": ["alpaca", "alpaca_chat", "sharegpt"],
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, file or folder to evaluate on. If not set, `dataset_test_split` of `dataset_name`, or "
            "what `test_split_size` holds out."
        },
    )


@dataclass
class MixtureArguments(DatasetMixtureConfig):
    """TRL's, for several datasets; `test_split_size` serves a single one as well."""

    _argument_group_name: ClassVar[str] = "mixture of datasets"

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Files, folders or Hub ids, one after the other; in a YAML file, entries with path, name, "
            "data_dir, data_files, split, columns and fraction."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read their rows while training, instead of before. Needs `max_steps`."}
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of the rows, or their number, to hold out and evaluate on."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.datasets, DatasetConfig):  # a single path, in a file
            self.datasets = [self.datasets]
        known = [item.name for item in fields(DatasetConfig)]
        for index, entry in enumerate(self.datasets):
            given: Any = {"path": entry} if isinstance(entry, str) else entry
            if isinstance(given, DatasetConfig):
                continue
            if not isinstance(given, dict) or "path" not in given:
                raise refusal(f"datasets with the entry {given!r}", "it has no path", "Write - path: HUB_ID_OR_FILE.")
            for name in given:
                if name not in known:
                    raise unknown_name(
                        f"an entry of datasets with {name!r}", name, known, f"Known: {', '.join(known)}."
                    )
            self.datasets[index] = DatasetConfig(**given)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, with the adapter that the trainer makes by default, and without what the training arguments have."""

    _argument_group_name: ClassVar[str] = "model and adapter"
    bnb_4bit_quant_type: ClassVar[str]  # type: ignore[misc]  # a field of QLoRAFSDPConfig, and one parser has both

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Has to be what `param_dtype` says, from which it follows.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Always: nothing but adapters can be trained here."})
    load_in_4bit: bool = field(default=True, metadata={"help": "Always."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout. Layers with dropout do not run fused (`fuse_lora`)."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "LoRA target modules. If not set, 'all-linear', unless there are lora_target_parameters."},
    )
    use_bnb_nested_quant: bool | None = field(  # type: ignore[assignment]  # None is "not given"
        default=None, metadata={"help": "TRL's name for `bnb_4bit_use_double_quant`."}
    )

    def __post_init__(self) -> None:
        if self.load_in_8bit or not self.load_in_4bit:
            given = "load_in_8bit=True" if self.load_in_8bit else "load_in_4bit=False"
            raise refusal(given, "only weights in 4 bits are sharded and trained here", "Leave it out.")
        if not self.use_peft:
            raise refusal(
                "use_peft=False",
                "weights in 4 bits cannot be trained themselves, only adapters on them",
                "Leave it out.",
            )
        if self.lora_task_type != "CAUSAL_LM":
            given = f"lora_task_type={self.lora_task_type!r}"
            raise refusal(given, "what is trained is a causal language model", "Leave it out.")
        super().__post_init__()
        modules: Any = self.lora_target_modules
        if modules is None and self.lora_target_parameters is None:
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]  # upstream makes text of it, too
        elif isinstance(modules, str) and modules != "all-linear" and modules.isidentifier():
            self.lora_target_modules = [modules]  # a text is a pattern for a whole name to PEFT, a list has endings


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        training (`dict[str, Any]`): Values for `QLoRAFSDPConfig`, those that were given.
        notes (`list[str]`): What is to be said about a file of another program, a line each.
    """

    run: RunArguments
    data: DataArguments
    mixture: MixtureArguments
    model: ModelArguments
    training: dict[str, Any]
    notes: list[str]

    def training_arguments(self) -> QLoRAFSDPConfig:
        """Make the arguments of the trainer, which joins the process group."""
        args = QLoRAFSDPConfig(**self.training)
        if self.model.bnb_4bit_quant_storage is not None:
            storage = getattr(torch, self.model.bnb_4bit_quant_storage, None)
            if not isinstance(storage, torch.dtype):
                given = f"bnb_4bit_quant_storage={self.model.bnb_4bit_quant_storage!r}"
                raise refusal(given, "torch has no such dtype", "Leave it out: it follows param_dtype.")
            check_storage_dtype(storage, args.compute_dtype)
        options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a dict by now
        revision = self.model.model_revision if self.model.model_revision != "main" else None
        model = {"attn_implementation": self.model.attn_implementation, "dtype": self.model.dtype, "revision": revision}
        for name, value in model.items():
            if value is not None and options.setdefault(name, value) != value:
                raise refusal(
                    f"{name}={value!r}, and {options[name]!r} in model_init_kwargs",
                    "they differ",
                    "Remove one of them.",
                )
        args.model_init_kwargs = options or None
        return args


class _TrainingArguments(QLoRAFSDPConfig):
    """`QLoRAFSDPConfig` under a heading of its own; nothing else differs, and none is made."""

    _argument_group_name: ClassVar[str] = "training: what TRL's SFTConfig has, then what shards it"


ALL: tuple[Any, ...] = (RunArguments, DataArguments, MixtureArguments, ModelArguments, _TrainingArguments)


def unknown_name(given: str, name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> ValueError:
    """Return the error for a name that nothing reads, with the names that are near."""
    close = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"Did you mean {' or '.join(prefix + other for other in close)}? " if close else ""
    return refusal(given, "nothing reads an option of that name", f"{hint}{otherwise}")

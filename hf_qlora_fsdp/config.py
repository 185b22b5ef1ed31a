"""The arguments of a training run, and what must be settled before anything is loaded.

`QLoRAFSDPConfig` is TRL's `SFTConfig` with a few fields more. What is worth knowing about it:

**One dtype.** FSDP2 casts what it gathers to the parameter dtype of its mixed-precision policy. Four-bit weights are
packed two to a byte, and the bytes are stored under some dtype: if it is another floating one, the cast changes the
bytes, and the model trains on garbage without an error. So nobody is asked for a storage dtype, nor for a compute
dtype: both follow from `param_dtype`, which follows from `bf16` / `fp16` or brings them along.

**One engine.** Sharding is FSDP2, always. Options in the style of FSDP1, of Axolotl and of `accelerate launch` are
read for what they mean there (`translation.py`), and held against ours (`settling.py`). Afterwards our fields alone say
how the run goes: `fsdp_config` is left nearly empty, and `fsdp_plugin_args`, from which transformers builds
accelerate's plugin, names everything that the plugin would otherwise look up in the environment.

**The process group comes first.** A config joins it (or founds a group of one) before upstream's `__post_init__`
does, because upstream's serves the GPUs alone, and offloaded parameters live on the CPU. From then on
`torch.distributed` is ready for the loader. accelerate accepts a group that exists.

**One gradient checkpointing.** transformers' own, inside the decoder layer. FSDP's wrapper around the layer would
change the names of its parameters, and adapters would be saved empty; asking for it gives the former.
"""

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig

from . import ranks
from .settling import (
    PRECISIONS,
    RENAMED,
    choose_device_type,
    join_ranks,
    read_own_fields,
    settle_checkpointing,
    settle_offload,
    settle_precision,
    settle_replication,
    take_over,
    threads_kept,
)
from .translation import Translation, refuse_unsupported, translate_environment, translate_fsdp
from .units import format_dtype

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


@dataclass
class QLoRAFSDPConfig(SFTConfig):
    """
    Configuration class for the [`QLoRAFSDPTrainer`]: [`~trl.SFTConfig`] and the fields below, whose meaning stands in
    their `help`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `2e-4` instead of `2e-5`
    >   (https://huggingface.co/papers/2305.14314, table 9: 2e-4 up to 13B, 1e-4 above).
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate for AdamW."})

    bnb_4bit_quant_type: str = field(
        default="nf4",
        metadata={
            "help": "4-bit data type of the frozen weights: 'nf4' (quantiles of a normal distribution) or 'fp4'.",
            "choices": ["nf4", "fp4"],
        },
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True,
        metadata={"help": "Quantise the block scales as well, which saves about 0.37 bits a parameter."},
    )
    param_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype in which gathered parameters arrive and matrices are multiplied: 'bfloat16', 'float16' or "
            "'float32'. Packed weights are stored under it too. If not set, it follows `bf16` and `fp16`: bfloat16 "
            "unless they say otherwise. LoRA weights, their gradients and optimizer states are float32 whatever it is.",
            "choices": list(PRECISIONS),
        },
    )
    transformer_layer_cls_to_wrap: list[str] | None = field(
        default=None,
        metadata={"help": "Classes of the layers that are sharded as one unit each. If not set, the model says."},
    )
    cpu_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep each rank's frozen shards in host memory and copy a unit to the device when it is needed: "
            "much less device memory, slower steps. What is trained stays on the device, with its optimizer states."
        },
    )
    cpu_offload_pin_memory: bool = field(
        default=True,
        metadata={
            "help": "With `cpu_offload`: page-lock the shards, so that the device copies them by itself. Without it "
            "the operating system may swap them out, and they are copied through a small pinned buffer."
        },
    )
    cpu_offload_layers: int | None = field(
        default=None,
        metadata={
            "help": "Offload only this many decoder layers, spread evenly over the model; embedding and head stay on "
            "the device. Implies `cpu_offload`."
        },
    )
    cpu_offload_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder on a local disk: offloaded shards lie in files there that are mapped into memory, and host "
            "memory is no more than a cache of them. Implies `cpu_offload` without pinned memory."
        },
    )
    cpu_offload_keep_files: bool = field(
        default=False,
        metadata={
            "help": "Leave the files in `cpu_offload_dir`, so that the next run with the same weights on as many ranks "
            "does not write them again. If not set, their space is free as soon as the run ends."
        },
    )
    cpu_offload_trainable: bool = field(
        default=False,
        metadata={
            "help": "Keep what is trained in host memory as well, with gradients and optimizer states: the optimizer "
            "then runs on the CPU. Worth it for large `modules_to_save`."
        },
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={
            "help": "Free a unit after its forward pass and gather it again for the backward pass. False saves that "
            "communication and holds the whole 4-bit model on every device from forward to backward."
        },
    )
    replicate_layers: str | None = field(
        default=None,
        metadata={
            "help": "Leave the frozen weights of this many decoder layers, spread evenly over the model, or of 'all', "
            "whole on every device, and shard only what is trained in them: nothing is gathered but adapters. Faster, "
            "above all with few tokens at a time; it takes the room of the parts that other devices would hold."
        },
    )
    shard_cache: bool = field(
        default=True,
        metadata={
            "help": "Write the quantised weights to disk when a model is first loaded, and read these, a quarter of "
            "the bytes, when it is loaded again with the same settings on any number of ranks."
        },
    )
    shard_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for them. If not set, the environment variable HF_QLORA_FSDP_SHARD_CACHE_DIR, else "
            "hf_qlora_fsdp/shards in HF_HOME. It may be removed at any time."
        },
    )

    expert_chunk: str | None = field(
        default=None,
        metadata={
            "help": "Of a mixture of experts: how much of a layer's experts is in 16 bits at a time, '256MiB' if not "
            "set. One expert always is; with two bytes a weight and N x K weights in the larger matrix of "
            "an expert, a forward or backward takes max(expert_chunk, 2 N K) * (1 + 1/32). Where all of a layer fits, "
            "nothing waits for the device to say which experts are hit."
        },
    )
    checkpoint_layers: str | None = field(
        default=None,
        metadata={
            "help": "With `gradient_checkpointing`: how many decoder layers are computed twice, a number or 'auto' for "
            "as many as memory demands, measured in the first two steps. If not set, all of them. With a number or "
            "'auto', a step that runs out of memory is done again with more of them."
        },
    )
    auto_plan: bool = field(
        default=False,
        metadata={
            "help": "Before anything is loaded, set batch and accumulation, `checkpoint_layers` and what is offloaded "
            "to what fits and is fastest by `hf-qlora-fsdp plan`, and print it. What is set to something else than its "
            "default stays, and so does the number of sequences in a step."
        },
    )
    fuse_lora: bool = field(
        default=True,
        metadata={
            "help": "Compute a 4-bit layer and its adapter as one function, and a gated MLP of such layers as another: "
            "faster, with less memory and fewer roundings. An RMSNorm that is not trained takes one pass over memory. "
            "Layers with dropout, DoRA or several adapters run as PEFT has them; one line says so."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do before a step whose gradients are infinite or not a number: 'stop' training with an "
            "error that names step, rank and last checkpoint, or 'skip' the step.",
            "choices": ["stop", "skip"],
        },
    )

    def __post_init__(self) -> None:
        own = QLoRAFSDPConfig.__annotations__
        read_own_fields(self, (item for item in fields(QLoRAFSDPConfig) if item.name in own))
        # Our fields win over the launcher's variables, but what the script says in any spelling must agree.
        take_over(self, translate_fsdp(self.fsdp, self.fsdp_config))
        take_over(self, translate_environment(os.environ), from_launcher=True)
        settle_offload(self)
        settle_replication(self)
        settle_checkpointing(self)
        settle_precision(self)
        refuse_unsupported(self.__dict__, os.environ)
        join_ranks(self, choose_device_type(self))
        # Upstream is not shown our options: it would give stale advice about them and lose some (`fsdp_plugin_args`
        # is ours anyway). https://github.com/huggingface/transformers/issues/30404
        self.fsdp, self.fsdp_config = None, None
        with threads_kept():
            super().__post_init__()
        self.fsdp: Any = True  # a switch, though upstream still annotates words
        self.fsdp_config = {"version": 2}
        self.fsdp_plugin_args = self._plugin_args()
        # `accelerate launch` sets it, and transformers then leaves missing tensors on ranks other than 0 as they are.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # Upstream falls back to ACCELERATE_MIXED_PRECISION, which would autocast a float32 run to something else.
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype (`torch.dtype`) of gathered parameters and of matrix products."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype (`torch.dtype`) under which packed bytes are stored: the compute dtype, or FSDP2 corrupts them."""
        return self.compute_dtype

    def quantization_config(self) -> BitsAndBytesConfig:
        """Return the quantisation in the terms of transformers."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            bnb_4bit_quant_storage=self.storage_dtype,
        )

    def hub_options(self) -> dict[str, Any]:
        """Return where `model_init_kwargs` says that the model is to be found; its tokenizer is there, too."""
        options: dict[str, Any] = dict(self.model_init_kwargs or {})  # type: ignore[arg-type]  # a dict by now
        return {name: options[name] for name in _HUB_OPTIONS if name in options}

    def mp_policy(self) -> MixedPrecisionPolicy:
        """Return the mixed-precision policy: gradients are reduced in float32, and losses are not rounded."""
        return MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32, output_dtype=None)

    def offload_policy(self) -> OffloadPolicy:
        """Return what PyTorch would call it; accelerate is told so. What is done is finer, see `sharding.py`."""
        return CPUOffloadPolicy(pin_memory=self.cpu_offload_pin_memory) if self.cpu_offload else OffloadPolicy()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON. Upstream hides all that ends in `_token`; two of them are vocabulary."""
        return super().to_dict() | {"eos_token": self.eos_token, "pad_token": self.pad_token}

    def reset_accelerator_state(self) -> None:
        """Make accelerate forget the trainer before this one; a trainer calls it before it makes its accelerator.

        accelerate keeps its state in a process-wide object that only the making of arguments resets. A second
        trainer with arguments made earlier would get the first one's plugin, and TRL would load with
        `device_map="auto"`. Changes to our fields since then are read, too.
        """
        self.__dict__.pop("_setup_devices", None)
        with threads_kept():
            self._setup_devices  # noqa: B018  the property resets the state, then finds the group that exists
        self.fsdp_plugin_args = self._plugin_args()

    @classmethod
    def from_training_args(cls, args: TrainingArguments, **overrides: Any) -> "QLoRAFSDPConfig":
        """Turn the arguments of another trainer into ours, with nothing lost.

        Every value stays as it is, the learning rate too: whether somebody chose it cannot be told. One line names
        what differs from our defaults and matters.

        Args:
            args (`TrainingArguments`): [`~trl.SFTConfig`], plain arguments, or ours, which come back unless overridden.
            overrides: Values of our fields, which win.

        Raises:
            ValueError: As for arguments that are written directly.
        """
        if isinstance(args, cls) and not overrides:
            return args
        ours = {item.name for item in fields(cls) if item.init}
        theirs = {item.name: copy.deepcopy(getattr(args, item.name)) for item in fields(args) if item.init}
        brought = translate_fsdp(theirs.pop("fsdp"), theirs.pop("fsdp_config"))
        values = {name: value for name, value in theirs.items() if name in ours} | brought.values
        if not {"param_dtype", "bf16", "fp16"}.isdisjoint(overrides):
            values |= {"param_dtype": None, "bf16": None, "fp16": False}
        for old, new in RENAMED.items():
            if new in ours and (old in brought.values or old in overrides):
                values[new] = None  # it would win over the older name
        config = cls(**(values | overrides))
        others = {name: value for name, value in theirs.items() if name not in ours}
        config.__dict__.update(others)  # fields of a class of the user's own, which a callback may read
        if not isinstance(args, cls):
            config._log_conversion(args, brought, others)
        return config

    def _log_conversion(self, args: TrainingArguments, brought: Translation, others: dict[str, Any]) -> None:
        kept = [f"{brought.said[name]} as {name}={value!r}" for name, value in brought.values.items()]
        if self.learning_rate != type(self).learning_rate:
            kept.append(f"learning_rate={self.learning_rate} (the default here is {type(self).learning_rate})")
        if self.compute_dtype != torch.bfloat16:
            kept.append(f"{format_dtype(self.compute_dtype)} (the default here is bfloat16)")
        if not self.gradient_checkpointing:
            kept.append("gradient_checkpointing=False (the default here is True)")
        if others:
            kept.append(f"{', '.join(sorted(others))}, which nothing here reads")
        what = f", with {'; '.join(kept)}" if kept else ""
        ranks.log_once(f"{type(args).__name__} is taken over as {type(self).__name__}{what}.")
        for note in brought.notes:
            ranks.log_once(note)

    def _plugin_args(self) -> dict[str, Any]:
        """Return the arguments of accelerate's plugin: all that it would otherwise read from `FSDP_*` variables."""
        return {
            "fsdp_version": 2,
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_offload": self.offload_policy(),
            "mixed_precision_policy": self.mp_policy(),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_cls_names_to_wrap": self.transformer_layer_cls_to_wrap,
            "state_dict_type": "FULL_STATE_DICT",
            "backward_prefetch": "NO_PREFETCH",  # accelerate's spelling of "FSDP2 does it by itself"
            "activation_checkpointing": False,
            "activation_checkpointing_offload": False,
            "cpu_ram_efficient_loading": False,
        }

"""The arguments of a training run, and what must be settled before anything is loaded.

`QLoRAFSDPConfig` is TRL's `SFTConfig` with a few fields more. What is worth knowing about it:

**One dtype.** FSDP2 casts what it gathers to the parameter dtype of its mixed-precision policy. Four-bit weights are
packed two to a byte, and the bytes are stored under some dtype: if it is another floating one, the cast changes the
bytes, and the model trains on garbage without an error. So nobody is asked for a storage dtype, nor for a compute
dtype: both follow from `param_dtype`, which follows from `bf16` / `fp16` or brings them along.

**One engine.** Sharding is FSDP2, always. Options in the style of FSDP1, of Axolotl and of `accelerate launch` are
read for what they mean there (`translation.py`). Afterwards our fields alone say how the run goes: `fsdp_config` is
left nearly empty, and `fsdp_plugin_args`, from which transformers builds accelerate's plugin, names everything that
the plugin would otherwise look up in the environment.

**The process group comes first.** A config joins it (or founds a group of one) before upstream's `__post_init__`
does, because upstream's serves the GPUs alone, and offloaded parameters live on the CPU. From then on
`torch.distributed` is ready for the loader. accelerate accepts a group that exists.

**One gradient checkpointing.** transformers' own, inside the decoder layer. FSDP's wrapper around the layer would
change the names of its parameters, and adapters would be saved empty; asking for it gives the former.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.distributed.distributed_c10d import get_backend_config
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig

from . import ranks
from .translation import (
    Translation,
    parse_bool,
    parse_names,
    refusal,
    refuse_unsupported,
    translate_environment,
    translate_fsdp,
)
from .units import format_dtype, parse_bytes

# Each parameter dtype as `bf16` and `fp16`.
_PRECISIONS = {"bfloat16": (True, False), "float16": (False, True), "float32": (False, False)}
_CUDA_AND_CPU = "cuda:nccl,cpu:gloo"
# transformers 5.23 has both names, the old one as an alias of the new one; 5.17 and TRL know only the old one.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


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
            "choices": list(_PRECISIONS),
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
            "faster, with less memory and fewer roundings. Layers with dropout, DoRA or several adapters run as PEFT "
            "has them; one line says so."
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
        self._read_own_fields()
        # Our fields win over the launcher's variables, but what the script says in any spelling must agree.
        self._take_over(translate_fsdp(self.fsdp, self.fsdp_config))
        self._take_over(translate_environment(os.environ), from_launcher=True)
        self._settle_offload()
        self._settle_checkpointing()
        self._settle_precision()
        refuse_unsupported(self.__dict__, os.environ)
        self._join_ranks(self._choose_device_type())
        # Upstream is not shown our options: it would give stale advice about them and lose some (`fsdp_plugin_args`
        # is ours anyway). https://github.com/huggingface/transformers/issues/30404
        self.fsdp, self.fsdp_config = None, None
        with _threads_kept():
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
        with _threads_kept():
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
        for old, new in _RENAMED.items():
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

    def _read_own_fields(self) -> None:
        defaults = {item.name: item.default for item in fields(self)}
        for old, new in _RENAMED.items():  # as upstream does, without its warning about TRL's own default
            if getattr(self, new, None) is not None:
                if getattr(self, old) not in (getattr(self, new), defaults[old]):
                    ranks.log_once(f"{new}={getattr(self, new)!r} wins over {old}={getattr(self, old)!r}.")
                setattr(self, old, getattr(self, new))
            elif hasattr(self, new):
                setattr(self, new, getattr(self, old))
        if self.hub_token == "<HUB_TOKEN>":  # what `to_dict` writes, with a token or without
            self.hub_token = None
        for item in fields(QLoRAFSDPConfig):
            if item.name in QLoRAFSDPConfig.__annotations__ and isinstance(item.default, bool):
                value = getattr(self, item.name)
                setattr(self, item.name, parse_bool(f"{item.name}={value!r}", value))
        names = self.transformer_layer_cls_to_wrap
        self.transformer_layer_cls_to_wrap = parse_names(f"transformer_layer_cls_to_wrap={names!r}", names)
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            given = f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}"
            raise refusal(given, "bitsandbytes has two 4-bit data types", 'Write "nf4", or "fp4".')
        if self.expert_chunk is not None:
            try:
                parse_bytes(self.expert_chunk)
            except ValueError:
                given = f"expert_chunk={self.expert_chunk!r}"
                raise refusal(given, "it is no size with a unit", 'Write "256MiB", or "1GiB".') from None
        if self.on_nonfinite not in ("stop", "skip"):
            given = f"on_nonfinite={self.on_nonfinite!r}"
            raise refusal(given, "a step with broken gradients cannot be taken", 'Write "stop", or "skip".')

    def _take_over(self, brought: Translation, from_launcher: bool = False) -> None:
        """Set the fields that other spellings mean, one line each; silence where they say what holds anyway."""
        defaults = {item.name: item.default for item in fields(self)}
        for name, value in brought.values.items():
            said, current = brought.said[name], getattr(self, name)
            if name == "gradient_checkpointing":
                for spelling in (name, _RENAMED[name]):
                    if hasattr(self, spelling):
                        setattr(self, spelling, True)
                ranks.log_once(f"{said} is read as {name}=True: it acts once, inside each decoder layer.")
            elif value == current:
                continue
            elif current == defaults[name]:
                setattr(self, name, value)
                ranks.log_once(f"{said} is read as {name}={value!r}.")
            elif not from_launcher:
                raise refusal(f"{name}={current!r} and {said}", "they contradict each other", "Remove one of them.")
            elif value != defaults[name]:
                ranks.log_once(f"{name}={current!r} wins over {said}.")
        for note in brought.notes:
            ranks.log_once(note)

    def _settle_offload(self) -> None:
        """Let the finer options of offloading say that there is offloading, and refuse what contradicts it."""
        if self.cpu_offload_layers is not None:
            self.cpu_offload_layers = int(self.cpu_offload_layers)
            if self.cpu_offload_layers < 1:
                raise refusal(
                    f"cpu_offload_layers={self.cpu_offload_layers}",
                    "it is the number of decoder layers to offload",
                    "Write 1 or more, or leave it out: cpu_offload alone decides then.",
                )
        if self.cpu_offload_keep_files and self.cpu_offload_dir is None:
            raise refusal(
                "cpu_offload_keep_files=True without cpu_offload_dir",
                "there are no files to keep",
                "Name the folder, cpu_offload_dir=PATH.",
            )
        self.cpu_offload = self.cpu_offload or self.cpu_offload_layers is not None or self.cpu_offload_dir is not None

    def _settle_checkpointing(self) -> None:
        """Read `checkpoint_layers`, and refuse what says otherwise how layers are computed twice."""
        wanted: Any = self.checkpoint_layers
        if wanted is None:
            return
        if wanted != "auto":
            try:
                wanted = int(wanted)
            except (TypeError, ValueError):
                wanted = -1
            if wanted < 0:
                raise refusal(
                    f"checkpoint_layers={self.checkpoint_layers!r}",
                    "it is the number of decoder layers that are computed twice",
                    'Write 0 or more, "auto" for as many as memory demands, or leave it out for all.',
                )
            self.checkpoint_layers = wanted
        given = f"checkpoint_layers={wanted!r}"
        if not self.gradient_checkpointing:
            raise refusal(
                f"{given} with gradient_checkpointing=False",
                "without gradient checkpointing no layer is computed twice",
                "Remove one of them; checkpoint_layers=0 computes none twice until memory runs out.",
            )
        if self.activation_offloading:
            raise refusal(
                f"{given} with activation_offloading=True",
                "all that the other layers keep on the device would be copied to the host and back",
                "Remove one of them.",
            )
        if "every_n_layers" in (self.gradient_checkpointing_kwargs or {}):
            raise refusal(f"{given} and every_n_layers", "both say which layers are computed twice", "Remove one.")

    def _settle_precision(self) -> None:
        """Let `param_dtype`, `bf16` and `fp16` say the same."""
        if isinstance(self.param_dtype, torch.dtype):
            self.param_dtype = format_dtype(self.param_dtype)
        if self.param_dtype is None:
            self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        elif self.param_dtype not in _PRECISIONS:
            raise refusal(
                f"param_dtype={self.param_dtype!r}",
                "gathered parameters have a floating dtype that the kernels know",
                f"Write one of {', '.join(_PRECISIONS)}.",
            )
        else:
            bf16, fp16 = _PRECISIONS[self.param_dtype]
            if self.bf16 not in (None, bf16) or (self.fp16 and not fp16):
                raise refusal(
                    f"param_dtype={self.param_dtype!r} with bf16={self.bf16} and fp16={self.fp16}",
                    "packed 4-bit weights survive only if parameters and computation have one dtype",
                    f"Write param_dtype={self.param_dtype!r} alone, or bf16=True or fp16=True alone.",
                )
            self.bf16, self.fp16 = bf16, fp16
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "fp16" if self.fp16 else "bf16" if self.bf16 else "no"):
            ranks.log_once(
                f"ACCELERATE_MIXED_PRECISION={launched} (from accelerate launch) has no effect: the script trains in "
                f"{format_dtype(self.compute_dtype)}."
            )

    def _choose_device_type(self) -> str:
        """Return the type of the device that trains, and tell upstream where it would guess another."""
        if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
            self.use_cpu = True
        elif not self.use_cpu and not torch.cuda.is_available():
            other = torch.accelerator.current_accelerator(check_available=True)
            if other is not None and other.type != "mps":  # neither bitsandbytes nor FSDP2 serve Apple's GPUs
                raise refusal(
                    f"a machine with {other.type} devices and no CUDA",
                    "quantisation and collectives are written and tested for CUDA devices and for CPUs",
                    "Write use_cpu=True to train on the CPU.",
                )
            self.use_cpu = True
            ranks.log_once("No CUDA device found: training on the CPU.")
        if self.use_cpu and self.fp16:
            raise refusal(
                f"{'param_dtype=' + repr(self.param_dtype) if self.param_dtype else 'fp16=True'} on a CPU",
                "float16 gradients need loss scaling, which accelerate has for accelerators only",
                'Write param_dtype="bfloat16" or "float32".',
            )
        return "cpu" if self.use_cpu else "cuda"

    def _join_ranks(self, device_type: str) -> None:
        """Join the process group before upstream does, whose group would serve one kind of device only."""
        if device_type == "cpu" and self.ddp_backend == _CUDA_AND_CPU:  # written by us, on another machine
            self.ddp_backend = None
        elif device_type == "cuda":
            if self.ddp_backend not in (None, _CUDA_AND_CPU):
                ranks.log_once(f"ddp_backend={self.ddp_backend!r} becomes {_CUDA_AND_CPU!r}.")
            self.ddp_backend = _CUDA_AND_CPU
        ranks.join_process_group(device_type, self.ddp_timeout)
        if self.cpu_offload_trainable and "cpu:" not in get_backend_config():
            raise refusal(
                f"cpu_offload_trainable=True in a process group of {get_backend_config()}",
                "gradients are clipped on the CPU then, and the group was made without a CPU backend",
                "Make QLoRAFSDPConfig before any other training arguments, or write "
                f'torch.distributed.init_process_group("{_CUDA_AND_CPU}") at the start of the script.',
            )

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


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Keep accelerate from setting the number of threads, with a warning, whenever it finds processes on a CPU."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]

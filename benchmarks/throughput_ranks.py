"""What each rank of `throughput.py` does: one training run after the other, each on a model of its own, timed.

`ours` is `QLoRAFSDPTrainer` on random weights. `stock` is what TRL's documentation makes of the same task: the model
loaded in 4 bits by `from_pretrained`, given to `SFTTrainer` with FSDP2. `plain` is our code without sharding: stock's
model with its 4-bit layers repacked and fused, and no FSDP. All see the same tokens in the same order.

A run that ends is a line of JSON in `--out`. One that fails is, too, and ends the process: `throughput.py` starts
another for what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib.metadata
import itertools
import json
import os
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from throughput_profile import start_profiler, write_profile
from torch import nn
from train_llama import drain, make_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer, compat
from hf_qlora_fsdp.compat.accelerate_cpu_fsdp import PATCH as CPU_FSDP
from hf_qlora_fsdp.packed_linear import repack
from hf_qlora_fsdp.rehearsal.memory_cap import MemoryCap
from hf_qlora_fsdp.sharding import base_model
from hf_qlora_fsdp.speed.fused_norms import fuse_norms
from hf_qlora_fsdp.speed.fusion import fuse_lora
from hf_qlora_fsdp.speed.matmul_share import count_multiplications, measure_matmul_rate

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PACK_TOKENS = 8192


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        kind (`str`): `"ours"`, `"stock"` or `"plain"`, see the module docstring.
        num_ranks (`int`): On how many GPUs.
        batch (`int`): Rows a GPU.
        shape (`str`): Of `train_llama.SHAPES`.
        liger (`bool`): Whether Liger's kernels are used.
        cap_gib (`int`, *optional*): Hold the cards to so much.
        packed (`bool`): Whether sequences of mixed length are packed, instead of being as long as `--seq`.
        options (`tuple`): Fields of the config, as pairs.
        num_steps (`int`, *optional*): So many steps, none of them timed, instead of what the command line says.
    """

    kind: str
    num_ranks: int
    batch: int
    shape: str = "llama-3-8b"
    liger: bool = False
    cap_gib: int | None = None
    packed: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    num_steps: int | None = None

    def count_steps(self, options: argparse.Namespace) -> int:
        """Return how many steps are taken, less the one that is profiled."""
        return self.num_steps or options.warm_up + options.steps * options.repetitions

    def is_profiled(self, options: argparse.Namespace) -> bool:
        """Return whether one more step is taken under the profiler, which takes it some seconds to write."""
        return bool(options.profile) and self.kind != "stock" and not self.num_steps


NOT_LIGERS = {"swiglu": False, "rms_norm": False}
LEARNS = {"shape": "llama-3.2-1b", "batch": 2, "num_steps": 100}
OURS = {"kind": "ours", "num_ranks": 2, "liger": True}
STOCK = {"kind": "stock", "num_ranks": 2}
FAST = ("learning_rate", 1e-3)
RUNS = {
    # Layers whole on every card, as many as leave it with no more in use than stock's.
    "ours-2-whole": Run(**OURS, batch=2, options=(("replicate_layers", "all"),)),
    "ours-2": Run(**OURS, batch=2),
    "ours-8-whole": Run(**OURS, batch=8, options=(("replicate_layers", 30),)),
    "ours-8": Run(**OURS, batch=8),
    "ours-8-auto": Run(**OURS, batch=8, cap_gib=72, options=(("checkpoint_layers", "auto"),)),
    "ours-packed": Run(**OURS, batch=1, packed=True),
    "ours-100": Run(**OURS, **LEARNS, options=(FAST,)),
    "ours-100-unfused": Run(**OURS, **LEARNS, options=(FAST, ("fuse_lora", False))),
    # The same sums as those of "unfused", rounded elsewhere.
    "ours-100-eager": Run(**OURS, **LEARNS, options=(FAST, ("fuse_lora", False), ("attn_implementation", "eager"))),
    "stock-2": Run(**STOCK, batch=2),
    "stock-8": Run(**STOCK, batch=8),
    "stock-packed": Run(**STOCK, batch=1, packed=True),
    "stock-8-liger": Run(**STOCK, batch=8, liger=True),  # last: Liger changes transformers for the whole process
    "plain-8-one": Run("plain", 1, 8, liger=True),  # before ours, which sets variables that ask for FSDP
    "ours-8-one": Run("ours", 1, 8, liger=True),
    "stock-8-one": Run("stock", 1, 8),
    "ours-70b": Run(**OURS, batch=1, shape="llama-2-70b", cap_gib=23, options=(("activation_offloading", True),)),
}


def main() -> None:
    """Do the runs, in the order of `RUNS`."""
    options = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in [name for name in RUNS if name in options.runs.split(",")]:
        try:
            figures = run(name, RUNS[name], options)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            write_line(options.out, {"run": name, "error": text})
            traceback.print_exc()
            os._exit(1)  # the other ranks may wait in a collective for ever
        if is_first():
            write_line(options.out, {"run": name, **figures})
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for config.json and checkpoints")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def run(name: str, this: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Do one run, and give the memory back.

    Returns:
        `dict`: What was measured. Memory is the largest of all ranks.
    """
    if this.kind == "stock" and this.liger and not (is_liger_kernel_available() or options.tiny):
        raise RuntimeError(f"{name} is stock with Liger's kernels, which are not installed: pip install liger-kernel")
    shape = "tiny" if options.tiny else this.shape
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    args = make_args(this, options, device)
    left_bytes = free(device)
    cap = MemoryCap(this.cap_gib << 30, device) if this.cap_gib and on_gpu else None
    rate = measure_matmul_rate(device, torch.bfloat16) if name == "ours-70b" else 0.0
    began = time.monotonic()
    watch = Watch(options, device, cap, options.profile / f"{name}.txt" if this.is_profiled(options) else None)
    trainer = make_trainer(this, options.folder / shape, args, make_data(this, options), device, watch)
    trainer.remove_callback(PrinterCallback)
    ready_seconds = time.monotonic() - began
    figures: dict[str, Any] = {}
    if this.packed and this.kind == "ours":
        figures["loss_packed"], figures["loss_alone"] = compare_packed(trainer)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = [row_tokens for row_tokens in map(len, trainer.train_dataset["input_ids"])]
    figures |= {
        "seconds": watch.repetitions(),
        "ready_seconds": ready_seconds,
        "tokens_per_step": this.batch * sum(tokens) / len(tokens),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "allocated_bytes": largest(watch.peak_bytes - left_bytes, device),
        "used_bytes": largest(watch.used_bytes, device),
        "left_bytes": left_bytes,
        "liger": this.liger and is_liger_kernel_available(),
        "attention": base_model(trainer.model).config._attn_implementation,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "versions": {package: version_of(package) for package in PACKAGES},
        "spec": asdict(this),
    }
    if rate:
        matmuls = count_multiplications(base_model(trainer.model))
        figures["matmul_flops_per_second"] = rate
        figures["flops_per_token"] = matmuls.flops_per_token(options.seq, checkpointing=True)
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    trainer.accelerator.free_memory()
    return figures


# -- what is trained -------------------------------------------------------------------------------------------------


def make_args(this: Run, options: argparse.Namespace, device: torch.device) -> SFTConfig:
    """Return the arguments: the same for all, and what the run is about."""
    shared: dict[str, Any] = {
        "output_dir": str(options.folder / "output"),
        "max_steps": this.count_steps(options) + this.is_profiled(options),
        "per_device_train_batch_size": this.batch,
        "bf16": True,
        "learning_rate": 1e-4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",
        "use_liger_kernel": this.liger and is_liger_kernel_available(),
        "max_length": (PACK_TOKENS if not options.tiny else 128) if this.packed else None,
        "packing": this.packed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
    }
    own = dict(this.options)
    if options.tiny:
        own.pop("activation_offloading", None)  # needs a card
        own |= {"replicate_layers": 1} if "replicate_layers" in own else {}  # it has two
    if this.kind == "ours":
        # What is fused does more, and without a gradient for weights that are not trained.
        shared["liger_kernel_config"] = NOT_LIGERS if shared["use_liger_kernel"] else None
        model_options = {name: own.pop(name) for name in ("attn_implementation",) if name in own}
        return QLoRAFSDPConfig(**(shared | own | {"model_init_kwargs": model_options | {"random_weights": True}}))
    if this.kind == "plain" and shared["use_liger_kernel"]:
        shared["liger_kernel_config"] = NOT_LIGERS
    if this.num_ranks > 1:
        shared |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "cpu_ram_efficient_loading": True,
            },
        }
        if device.type == "cpu":
            compat.apply(CPU_FSDP)  # or it would be DDP, see there
    return SFTConfig(**(shared | own))


def make_data(this: Run, options: argparse.Namespace) -> Dataset:
    """Return tokens, random ones, enough for every step. Packed rows are of mixed length: most short, a few long."""
    draw = random.Random(0)
    num_rows = (this.count_steps(options) + 1) * this.batch * this.num_ranks
    lengths = [64 if options.tiny else options.seq] * num_rows
    if this.packed:
        longest = 128 if options.tiny else PACK_TOKENS
        lengths = []
        while sum(lengths) < (num_rows + 2) * longest:
            lengths.append(min(max(int(draw.lognormvariate(6.5, 0.9)), 32), longest // 2))
    rows = [[draw.randrange(3, 500) for _ in range(length)] for length in lengths]
    if this.num_steps:  # something to learn: each token follows from the one before, of which there are 40
        rows = [[3 + 12 * (pow(5, place, 41) * row[0] % 41) for place in range(len(row))] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_trainer(
    this: Run, folder: Path, args: SFTConfig, data: Dataset, device: torch.device, watch: Watch
) -> SFTTrainer:
    """Return the trainer of a run, its model loaded. Whoever needs a checkpoint first writes it."""
    lora = LoraConfig(**LORA)
    named = {"train_dataset": data, "processing_class": make_tokenizer(), "callbacks": [watch]}
    if this.kind == "ours":
        return QLoRAFSDPTrainer(str(folder), args, peft_config=lora, **named)
    if is_first():
        with one_at_a_time(folder):
            if not (folder / "model.safetensors.index.json").exists():
                write_checkpoint(folder, folder.name)
    if dist.is_initialized():
        dist.barrier()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    # What TRL advises for packing, where it is installed.
    attention = "flash_attention_2" if this.packed and is_flash_attn_2_available() else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        **({"device_map": {"": device}} if this.num_ranks == 1 else {}),  # bitsandbytes' quantizer knows it otherwise
    )
    trainer = SFTTrainer(model=model, args=args, peft_config=lora, **named)
    if this.kind == "plain":
        pack_and_fuse(trainer.model)
    return trainer


def pack_and_fuse(model: nn.Module) -> None:
    """Give a model of PEFT and bitsandbytes our layers, and leave it whole."""
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            module.base_layer = repack(
                module.base_layer, compute_dtype=torch.bfloat16, storage_dtype=torch.bfloat16
            ).to(module.base_layer.weight.device)
    report = fuse_lora(model)
    fuse_norms(model)
    assert not report.unfused, report.describe()


@torch.no_grad()
def compare_packed(trainer: Any) -> tuple[float, float]:
    """Return the loss of one pack, and that of its sequences, each run alone."""
    row = trainer.train_dataset[dist.get_rank() if dist.is_initialized() else 0]
    bounds = [0]
    for length in row["seq_lengths"]:
        bounds.append(bounds[-1] + length)
    alone = [
        {"input_ids": row["input_ids"][start:stop], "labels": row["labels"][start:stop]}
        for start, stop in itertools.pairwise(bounds)
    ]
    # All ranks run the model equally often; what is run for the others' sake counts nothing.
    device = trainer.accelerator.device
    most = int(largest(len(alone), device))
    losses, weights = [], []
    for index in range(most):
        piece = alone[min(index, len(alone) - 1)]
        losses.append(loss_of(trainer, [piece]))
        weights.append(max(len(piece["input_ids"]) - 1, 0) if index < len(alone) else 0)
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return loss_of(trainer, [row]), mean


def loss_of(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the mean loss of a batch of rows, as the trainer computes it."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    if len(rows[0]["input_ids"]) == batch["max_length_q"]:  # one sequence: plain causal attention
        batch = {name: value for name, value in batch.items() if not name.startswith(("cu_", "max_"))}
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, batch).item()


# -- what is measured ------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Times each step, the device drained before and after, and profiles one more if asked to.

    Args:
        options (`argparse.Namespace`): How many steps, and how often.
        device (`torch.device`): This rank's.
        cap (`MemoryCap`, *optional*): Adjusted before each step.
        profile (`Path`, *optional*): Where rank 0 writes what it saw.
    """

    def __init__(
        self, options: argparse.Namespace, device: torch.device, cap: MemoryCap | None, profile: Path | None
    ) -> None:
        self.options, self.device, self.cap, self.profile = options, device, cap, profile
        self.seconds: list[float] = []
        self.peak_bytes = self.used_bytes = 0
        self.profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cap is not None and state.global_step:
            self.cap.settle()
        if self.profile and state.global_step == state.max_steps - 1:
            self._take_peaks()
            self.profiler = start_profiler()
        drain()
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drain()
        seconds = time.monotonic() - self.began
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            if is_first():
                write_profile(self.profiler, self.profile, seconds)
            return
        self.seconds.append(seconds)
        self._take_peaks()

    def repetitions(self) -> list[list[float]]:
        """Return the timed steps, in sets."""
        timed, steps = self.seconds[self.options.warm_up :], self.options.steps
        return [timed[start : start + steps] for start in range(0, len(timed), steps)]

    def _take_peaks(self) -> None:
        if self.device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
            self.used_bytes = max(self.used_bytes, total_bytes - free_bytes)


def free(device: torch.device) -> int:
    """Give back what the run before has left, and return how much of it is still allocated."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.set_device(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def largest(value: float, device: torch.device) -> float:
    """Return the largest of all ranks' values."""
    if not dist.is_initialized():
        return value
    everybody = torch.tensor([float(value)], dtype=torch.float64, device=device)
    dist.all_reduce(everybody, dist.ReduceOp.MAX)
    return everybody.item()


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep a run that goes on beside this one from doing the same."""
    with (folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def is_first() -> bool:
    """Return whether this is rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def version_of(package: str) -> str:
    """Return the version of a package, or `absent`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def write_line(file: Path, value: dict[str, Any]) -> None:
    """Append one line of JSON."""
    with file.open("a") as stream:
        stream.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()

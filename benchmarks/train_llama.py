"""Claim: a Llama of a given shape loads from disk and trains through the public API in so much memory, at such a rate.

Random weights of the real shapes are written once as an ordinary sharded checkpoint (`--checkpoints`), then read,
quantised, sharded and trained by `QLoRAFSDPTrainer`, as a user would. Rank 0 appends one row a figure to
`results.csv`. "used" is what the driver says is in use on the card, CUDA context and NCCL included.

    torchrun --nproc_per_node 2 benchmarks/train_llama.py --shape llama-3-8b --seq 2048 --batch 2
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer
from hf_qlora_fsdp.anatomy import build_meta_model

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "llama-3.2-1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "llama-3-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-2-70b": {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
HEADS = {"tiny": (4, 2), "llama-3.2-1b": (32, 8), "llama-3-8b": (32, 8), "llama-2-70b": (64, 8)}
SHARD_BYTES = 4 << 30
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("date", "claim", "value", "unit", "command", "hardware", "versions")


def main() -> None:
    """Load, train, and record what it took."""
    options = parse_arguments()
    # The config first: it makes the process group, and chooses the device.
    args = QLoRAFSDPConfig(
        output_dir=str(options.checkpoints / "output"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_offloading=options.activation_offloading,
        param_dtype=options.param_dtype,
        cpu_offload=options.cpu_offload,
        cpu_offload_pin_memory=not options.no_pin,
        cpu_offload_layers=options.cpu_offload_layers,
        cpu_offload_dir=options.cpu_offload_dir,
        fuse_lora=not options.no_fuse,
        shard_cache=False,  # or the second run would not read the checkpoint
        use_liger_kernel=options.liger,
        liger_kernel_config={"swiglu": False, "rms_norm": False} if options.liger else None,
    )
    folder = options.checkpoints / options.shape
    if dist.get_rank() == 0 and not (folder / "config.json").exists():
        write_checkpoint(folder, options.shape)
    dist.barrier()
    watch = Stopwatch()
    reset_peak()
    began = time.monotonic()
    rows = options.batch * dist.get_world_size() * options.steps
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 500, (rows, options.seq), generator=generator).tolist()
    trainer = QLoRAFSDPTrainer(
        str(folder),
        args,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        processing_class=make_tokenizer(),
        callbacks=[watch],
    )
    figures = {"start to trainer ready": (time.monotonic() - began, "s")}
    report = trainer.model.load_report
    figures["load"] = (report.seconds, "s")
    figures["checkpoint"] = (report.checkpoint_bytes / 2**30, "GiB")
    figures["read by rank 0"] = (report.bytes_read / 2**30, "GiB")
    figures["load peak allocated"] = (peak_bytes() / 2**30, "GiB")
    reset_peak()
    trainer.train()
    seconds = statistics.median(watch.seconds[min(3, options.steps - 1) :])
    figures["step"] = (seconds, "s")
    figures["rate"] = (options.batch * options.seq / seconds, "tokens/s/GPU")
    figures["train peak allocated"] = (peak_bytes() / 2**30, "GiB")
    figures["train used"] = (used_bytes() / 2**30, "GiB")
    figures["host memory of rank 0"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
    figures["loss, first step"] = (next(log["loss"] for log in trainer.state.log_history if "loss" in log), "nats")
    if dist.get_rank() == 0:
        record(figures, options)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Return the options of this run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="where random weights are written"
    )
    parser.add_argument("--param-dtype", default="bfloat16")
    parser.add_argument("--activation-offloading", action="store_true")
    parser.add_argument("--cpu-offload", action="store_true")
    parser.add_argument("--no-pin", action="store_true")
    parser.add_argument("--cpu-offload-layers", type=int)
    parser.add_argument("--cpu-offload-dir")
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


class Stopwatch(TrainerCallback):
    """Times each step, with the device drained before and after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        drain()
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        drain()
        self.seconds.append(time.monotonic() - self.began)


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write random weights (normal, std 0.02; norms one) as sharded safetensors, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in build_meta_model(config, torch.bfloat16).named_parameters():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            tensor = tensor.normal_(0, 0.02, generator=generator).cpu()
        shard[name] = tensor
        total += tensor.nbytes
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is never asked: the data are tokens already."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def record(figures: dict[str, tuple[float, str]], options: argparse.Namespace) -> None:
    """Print the figures as a table and append them to the results."""
    hardware = f"{dist.get_world_size()}x {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    versions = " ".join(f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES)
    command = f"torchrun --nproc_per_node {dist.get_world_size()} benchmarks/train_llama.py {' '.join(settings())}"
    new = not options.results.exists()
    with options.results.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(COLUMNS)
        for claim, (value, unit) in figures.items():
            print(f"{claim:<24} {value:12.3f} {unit}")
            today = datetime.date.today().isoformat()
            writer.writerow([today, f"{options.shape}: {claim}", f"{value:.4g}", unit, command, hardware, versions])


def settings() -> list[str]:
    """Return the arguments of this run, less the ones that say where files go."""
    arguments = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    places = [index for index, word in enumerate(arguments) if word in ("--checkpoints", "--results")]
    return [word for index, word in enumerate(arguments) if index not in places and index - 1 not in places]


def drain() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begin to measure the peak anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Return the most that tensors took since."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def used_bytes() -> int:
    """Return what the driver says is in use on the card."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

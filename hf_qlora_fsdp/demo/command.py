"""What `hf-qlora-fsdp demo` runs: a real model learns a countable task, sharded in 4 bits, while you watch.

    this process                        N processes, started by torch's agent
    find_model    a folder              QLoRAFSDPTrainer   plan, load, quantise, shard
    launch        start them, wait      answer             held-out orders, before
    answer_merged one plain model       trainer.train      NF4, LoRA r=16, loss on the answer alone
    judge         read report.json      answer             the same orders, after
                                        save, check        a plain PEFT adapter

The task is `orders.py`: free text in, JSON out, scored by a program on orders whose names, goods and phrasings training
has never seen. The model is SmolLM2-135M-Instruct, small enough for two CPU cores; on GPUs the same command uses them.

`train_and_score` is how a user would write it, and the merged model, which answers the same orders once more, is what
that user would put to work. All else is there to report.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..launch import default_num_processes, run_workers
from ..units import format_bytes, format_seconds
from .model import DEFAULT_MODEL, find_model
from .orders import HELD_OUT, TRAIN, Example, generate_orders, score

REPORT_FILE = "report.json"
GLOBAL_BATCH_SIZE = 8
NUM_HELD_OUT = 32
MAX_MERGED_BYTES = 4 * 2**30
"""Larger models are not merged here: the merged one is loaded whole, to answer as any other model does."""

MAX_LOST = 2
"""Answers that merging may cost. It rounds each weight once more, which moves a token's log-probability by 0.001 on
average (`benchmarks/merge.csv`): of 32 answers, one or two may hang by such a thread."""

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
    num_processes = args.num_processes or default_num_processes()
    arguments = [f"--model={model}"]
    for name in ("steps", "output_dir", "seed"):
        arguments.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    failed = run_workers("hf_qlora_fsdp.demo.command", arguments, num_processes, _KEEP_FREED_MEMORY)
    if failed:
        code = next(iter(failed.values()))
        print(f"The demo failed with exit code {code}; the first error above says why.", file=sys.stderr)
        return 1
    answer_merged(model, report)
    print(f"The whole demo took {format_seconds(time.monotonic() - started)}.")
    return judge(report, args.min_accuracy)


def answer_merged(model: str, report: Path) -> None:
    """Merge the adapter beside the report, and let the merged model answer the same orders, in one plain process.

    Args:
        model (`str`): Folder of the base.
        report (`Path`): Gets `accuracy_merged` and `wrong_merged`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..merging.merger import merge_adapter

    num_bytes = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if num_bytes > MAX_MERGED_BYTES:
        print(f"A model of {format_bytes(num_bytes)} is not merged here. `hf-qlora-fsdp merge --help` says how to.")
        return
    started, found = time.monotonic(), json.loads(report.read_text())
    orders = generate_orders(HELD_OUT, found["num_held_out"], found["seed"])
    with tempfile.TemporaryDirectory() as aside:
        folder = merge_adapter(model, str(report.parent), f"{aside}/merged", base_weights="trained", progress=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        merged: Any = AutoModelForCausalLM.from_pretrained(folder)
    merged.to("cuda" if torch.cuda.is_available() else "cpu")
    answers = write_answers(merged, tokenizer, orders, _longest(tokenizer, orders))
    wrong = _find_wrong(orders, answers)
    found |= {"accuracy_merged": 1 - len(wrong) / len(orders), "wrong_merged": wrong}
    report.write_text(json.dumps(found, indent=1) + "\n")
    _say_score("by the merged model", len(orders) - len(wrong), len(orders), started)


def judge(report: Path, min_accuracy: float) -> int:
    """Return the exit code for a finished run: 1, with the reason on stderr, if it answered too little right."""
    found = json.loads(report.read_text())
    after = found["accuracy_after"]
    merged = found.get("accuracy_merged", after)  # large models are not merged
    for accuracy, whose in ((after, "after training"), (merged, "of the merged model")):
        if accuracy < min_accuracy:
            print(
                f"Held-out accuracy {whose} is {accuracy:.0%}, below the {min_accuracy:.0%} of --min-accuracy. "
                "Raise --steps, or lower --min-accuracy.",
                file=sys.stderr,
            )
            return 1
    if (after - merged) * found["num_held_out"] > MAX_LOST:
        print(
            f"The merged model answers {merged:.0%} right and the trained one {after:.0%}, so it is not the model that "
            "was trained. Please report this.",
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


# -- the N processes -------------------------------------------------------------------------------------------------


def train_and_score(args: argparse.Namespace) -> None:
    """Train on orders, and answer held-out ones before and after. Runs in every process."""
    import datasets
    from peft import LoraConfig

    from ..config import QLoRAFSDPConfig
    from ..ranks import world_size
    from ..trainer import QLoRAFSDPTrainer

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
    import torch.distributed as dist

    from ..ranks import rank, world_size

    started, tokenizer = time.monotonic(), trainer.processing_class
    mine, longest = orders[rank() :: world_size()], _longest(tokenizer, orders)
    texts = write_answers(trainer.model, tokenizer, mine, longest, synced_gpus=world_size() > 1)
    shares: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(shares, texts)
    answers = [text for row in zip(*shares, strict=True) for text in row]
    if rank() == 0:
        _say_score(when, len(orders) - len(_find_wrong(orders, answers)), len(orders), started)
    return answers


def write_answers(model: Any, tokenizer: Any, orders: list[Example], max_new_tokens: int, **options: Any) -> list[str]:
    """Let a model write its answers, greedily."""
    import torch

    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [order.messages for order in orders],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    model.eval()
    with torch.no_grad():
        written = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, **options)
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _longest(tokenizer: Any, orders: list[Example]) -> int:
    """Return how many tokens to write at most: what is longer than the longest right answer is wrong anyway."""
    return max(len(tokenizer(order.answer)["input_ids"]) for order in orders) + 2


def _find_wrong(orders: list[Example], answers: list[str]) -> list[dict[str, str]]:
    return [
        {"order": order.text, "answer": text, "expected": order.answer}
        for text, order in zip(answers, orders, strict=True)
        if not score(text, order.expected)
    ]


def _say_score(when: str, num_right: int, num_orders: int, started: float) -> None:
    seconds = format_seconds(time.monotonic() - started)
    print(f"Held-out orders answered exactly {when}: {num_right} of {num_orders} ({seconds})", flush=True)


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
    wrong = _find_wrong(orders, after)
    found = {
        "model": args.model,
        "num_steps": args.steps,
        "seed": args.seed,
        "num_held_out": len(orders),
        "accuracy_before": 1 - len(_find_wrong(orders, before)) / len(orders),
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

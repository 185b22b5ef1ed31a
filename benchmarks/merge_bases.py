"""Which base to merge onto: held-out loss and accuracy of the trained model, and of both merged ones.

    hf-qlora-fsdp demo
    python benchmarks/merge_bases.py --adapter demo-output

The trained model is the one of the demo: 4-bit base and adapter, loaded as for training. The loss is the mean over the
tokens of the right answers, given the prompts (teacher forcing); an answer is right if its JSON is. Appends the figures
to `merge.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qlora_fsdp.demo.command import REPORT_FILE
from hf_qlora_fsdp.demo.model import DEFAULT_MODEL, find_model
from hf_qlora_fsdp.demo.orders import HELD_OUT, Example, generate_orders, score
from hf_qlora_fsdp.export import load_adapter
from hf_qlora_fsdp.loader import load_quantized_model
from hf_qlora_fsdp.merging.merger import merge_adapter

RESULTS = Path(__file__).parent / "merge.csv"
NUM_ANSWERED = 24
MAX_NEW_TOKENS = 128
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def models(base: str, adapter: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the trained model and the two merged ones, one at a time."""
    fields = json.loads((Path(adapter) / "adapter_config.json").read_text())
    wanted = {name: fields[name] for name in ("r", "lora_alpha", "target_modules", "task_type")}
    trained = load_quantized_model(base, peft_config=LoraConfig(**wanted), progress=False)
    load_adapter(trained, adapter)
    yield "trained: 4-bit base and adapter", trained
    del trained
    for base_weights in ("original", "trained"):
        with tempfile.TemporaryDirectory() as folder:
            merge_adapter(base, adapter, Path(folder) / "merged", base_weights=base_weights, progress=False)
            yield f"merged onto {base_weights}", AutoModelForCausalLM.from_pretrained(Path(folder) / "merged")


@torch.no_grad()
def answer_losses(model: torch.nn.Module, tokenizer, orders: list[Example]) -> list[torch.Tensor]:
    """Return the loss of each token of the right answers, order by order."""
    losses = []
    for order in orders:
        answered = [*order.messages, {"role": "assistant", "content": order.answer}]
        encoded = tokenizer.apply_chat_template(order.messages, add_generation_prompt=True, return_dict=True)
        prompt, ids = encoded["input_ids"], tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
        target = torch.tensor(ids[len(prompt) :])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return losses


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer, orders: list[Example]) -> float:
    """Return the share of orders that are answered exactly, written greedily as in the demo."""
    prompts = tokenizer.apply_chat_template(
        [order.messages for order in orders],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True)
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(score(text.strip(), order.expected) for text, order in zip(texts, orders, strict=True)) / len(orders)


def main() -> None:
    """Measure, print, and append to `merge.csv`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default=DEFAULT_MODEL)
    parser.add_argument("--adapter", default="demo-output")
    parser.add_argument("--orders", type=int, default=192, help="held-out orders for the loss (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = find_model(args.base)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    orders = generate_orders(HELD_OUT, args.orders, args.seed)
    versions = " ".join(f"{name}=={version(name)}" for name in PACKAGES)
    report = json.loads((Path(args.adapter) / REPORT_FILE).read_text())
    command = f"python benchmarks/merge_bases.py --orders {args.orders} --seed {args.seed}"
    command += f" (adapter of a demo of {report['num_steps']} steps)"
    rows: list[list[str]] = []
    reference: list[torch.Tensor] = []
    for claim, model in models(base, args.adapter):
        model.eval()
        losses, right = answer_losses(model, tokenizer, orders), accuracy(model, tokenizer, orders[:NUM_ANSWERED])
        reference = reference or losses
        figures = [
            ("loss", f"{torch.cat(losses).mean():.4f}", "nats/token"),
            ("accuracy", f"{right:.3f}", f"of {NUM_ANSWERED} orders"),
        ]
        if losses is not reference:
            pairs = [(ours - theirs).mean() for ours, theirs in zip(losses, reference, strict=True)]
            moved = (torch.cat(losses) - torch.cat(reference)).abs().mean()
            error = torch.stack(pairs).std() / len(pairs) ** 0.5
            figures += [
                (
                    "loss above that of the trained model",
                    f"{torch.stack(pairs).mean():.4f}",
                    "nats/token, mean of orders",
                ),
                ("standard error of that", f"{error:.4f}", "nats/token, mean of orders"),
                ("how far a token's log-probability is from the trained model's", f"{moved:.4f}", "nats"),
            ]
        for name, value, unit in figures:
            print(f"{claim}: {name} {value} {unit}", flush=True)
            hardware = f"CPU {platform.machine()}"
            rows.append([time.strftime("%Y-%m-%d"), f"{claim}: {name}", value, unit, command, hardware, versions])
    with RESULTS.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if not stream.tell():
            writer.writerow(["date", "claim", "value", "unit", "command", "hardware", "versions"])
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())

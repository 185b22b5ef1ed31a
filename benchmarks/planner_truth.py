"""Claim: the planner's figures are those of the cards. Measures what `hf-qlora-fsdp plan` predicts.

One pair of processes trains many configurations one after the other, each with the real trainer on random weights
(`rehearsal/workers.py`), three steps each, and writes a line of JSON as soon as one is measured: peaks of card and host
by phase, seconds, and what lies outside of torch's allocator. A configuration that runs out of memory ends the
processes; it is written down as such, and new ones go on with the next.

    python benchmarks/planner_truth.py --minutes 9.5 --results benchmarks/results.csv
    python benchmarks/planner_table.py

What does not fit into the minutes is left out, the last configurations first; `--only` names the rest in another call,
and `--measured FILE` records what an earlier call wrote. With `--pictures`, every allocation that is alive at the peak
of a steady step is kept, summed by the code that asked for it, against which the planner's causes can be held one by
one.

All of them took five minutes on two H200 (28 November 2026). Models of 70B and 405B are measured by `offload.py`, whose
rows the table has as well. `--tiny` runs all with models of a few kilobytes on a CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload import LLAMA, SHAPES
from promises import COLUMNS, GIB

from hf_qlora_fsdp.launch import is_worker, run_workers
from hf_qlora_fsdp.rehearsal import command as rehearsal

QWEN = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
TRUTH_SHAPES: dict[str, dict[str, Any]] = SHAPES | {
    "llama-3.2-1b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"num_attention_heads": 32, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "llama-3.2-3b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    | {"num_attention_heads": 24, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "llama-2-13b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 4096},
    "qwen2.5-32b": QWEN
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 5120}
    | {"intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    | {"max_position_embeddings": 32768},
    "mixtral-8x7b": LLAMA
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096}
    | {"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_local_experts": 8}
    | {"num_experts_per_tok": 2, "max_position_embeddings": 32768},
    # A quarter of the layers of Qwen3-30B-A3B.
    "qwen3-moe-8b": QWEN
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048}
    | {"intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
    | {"norm_topk_prob": True, "max_position_embeddings": 40960},
}
_SMALLER = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16}
_SMALLER |= {"num_attention_heads": 8, "num_key_value_heads": 4, "moe_intermediate_size": 64, "num_experts": 4}
_SMALLER |= {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Configuration:
    """One run.

    Args:
        shape (`str`): Of `TRUTH_SHAPES`.
        words (`str`): Options of `rehearse`.
        seconds (`float`): What it takes on two H100s, about: whether it still fits into `--minutes`.
        ranks (`int`): Processes.
    """

    shape: str
    words: str
    seconds: float
    ranks: int = 2

    @property
    def options(self) -> argparse.Namespace:
        """The words as `rehearse` reads them."""
        parser = argparse.ArgumentParser()
        rehearsal.add_arguments(parser)
        return parser.parse_args([self.shape, "--steps", "3", *self.words.split()])


_ATTENTION = "--target-modules q_proj k_proj v_proj o_proj"
CONFIGURATIONS = {
    "1b-b4": Configuration("llama-3.2-1b", "--batch 4", 11),
    "1b-b2-kept": Configuration("llama-3.2-1b", "--batch 2 --no-gradient-checkpointing", 6),
    "1b-b4-unfused": Configuration("llama-3.2-1b", "--batch 4 --no-fuse-lora", 7),
    "1b-s8192": Configuration("llama-3.2-1b", "--seq 8192 --use-liger-kernel --lora-r 64", 9),
    "3b-s4096-liger": Configuration("llama-3.2-3b", "--seq 4096 --batch 2 --use-liger-kernel", 14),
    "3b-s512-attention": Configuration("llama-3.2-3b", f"--seq 512 --batch 8 --lora-r 64 {_ATTENTION}", 10),
    "8b-b2": Configuration("llama-3-8b", "--batch 2", 14),
    "8b-b8-liger": Configuration("llama-3-8b", "--batch 8 --use-liger-kernel", 15),
    "8b-pinned": Configuration("llama-3-8b", "--batch 2 --cpu-offload", 14),
    "8b-half-unpinned": Configuration(
        "llama-3-8b", "--batch 2 --cpu-offload-layers 16 --no-pin --activation-offloading --use-liger-kernel", 14
    ),
    "8b-kept-liger": Configuration("llama-3-8b", "--no-gradient-checkpointing --use-liger-kernel", 12),
    "qwen3-moe": Configuration("qwen3-moe-8b", "--batch 2", 16),
    "8b-s8192": Configuration("llama-3-8b", "--seq 8192 --activation-offloading --use-liger-kernel", 16),
    "13b-s1024-r8": Configuration("llama-2-13b", "--seq 1024 --batch 4 --lora-r 8", 16),
    "mixtral": Configuration("mixtral-8x7b", "--batch 1", 22),
    "32b-r64": Configuration("qwen2.5-32b", "--batch 1 --lora-r 64", 30),
    "1b-b4-alone": Configuration("llama-3.2-1b", "--batch 4", 10, ranks=1),
    "8b-b2-alone": Configuration("llama-3-8b", "--batch 2", 14, ranks=1),
    "8b-unpinned-alone": Configuration(
        "llama-3-8b", "--seq 4096 --cpu-offload --no-pin --use-liger-kernel", 16, ranks=1
    ),
}
START_SECONDS = 25
"""Until new processes are ready to load."""


def main() -> int:
    """Measure what was asked for, or record what was measured."""
    options = parse_arguments()
    if options.measured:
        lines = read_lines(options.measured)
    else:
        measure(options)
        lines = read_lines(options.out)
    if options.results:
        record(lines, options.results)
    for line in lines:
        print(summarize(line))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the options of this run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Absolute, since the workers start in another folder.
    parser.add_argument("--out", type=_absolute, default=_absolute("truth.jsonl"), help="a line for each configuration")
    parser.add_argument("--only", help=f"some of them, as a,b (all: {', '.join(CONFIGURATIONS)})")
    parser.add_argument("--minutes", type=float, default=10, help="begin nothing that would take longer (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="new processes for each, 25 s more, to measure the host")
    parser.add_argument("--tiny", action="store_true", help="tiny models, without what needs a card")
    parser.add_argument("--pictures", action="store_true", help="record allocations, which makes steps slower")
    parser.add_argument("--measured", type=_absolute, metavar="FILE", help="take an earlier run's --out, run nothing")
    parser.add_argument("--results", type=_absolute, metavar="CSV", help="append the figures there")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - CONFIGURATIONS.keys() if options.only else set()
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: no such configuration")
    return options


def _absolute(path: str) -> Path:
    return Path(path).absolute()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return what was written, the first line of each configuration."""
    found: dict[str, dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        line = json.loads(text)
        found.setdefault(line["name"], line)
    return list(found.values())


# -- the process that starts the others ------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Run the configurations, in new processes whenever one has failed."""
    deadline = time.time() + options.minutes * 60
    out = options.out
    out.write_text("")
    os.chdir(Path(__file__).parent)  # where `-m planner_truth` is found
    # Liger changes the classes of a model for as long as the process lives.
    wanted = sorted(options.only.split(",") if options.only else CONFIGURATIONS, key=_runs_liger)
    groups = [[name for name in wanted if CONFIGURATIONS[name].ranks == ranks] for ranks in (2, 1)]
    if options.fresh:
        groups = [[name] for names in groups for name in names]
    for group in groups:
        while group and time.time() + START_SECONDS + CONFIGURATIONS[group[0]].seconds < deadline:
            handed_on = {"names": group, "out": str(out), "deadline": deadline}
            handed_on |= {"tiny": options.tiny, "pictures": options.pictures}
            codes = run_workers("planner_truth", [json.dumps(handed_on)], CONFIGURATIONS[group[0]].ranks)
            done = [line["name"] for line in read_lines(out)]
            if codes and not set(group) - set(done):
                break
            if codes and not any(line["name"] in group and "failed" in line for line in read_lines(out)):
                write_line(out, {"name": next(name for name in group if name not in done), "failed": f"exit {codes}"})
            done = [line["name"] for line in read_lines(out)]
            group = [name for name in group if name not in done] if codes else []


def _runs_liger(name: str) -> bool:
    return CONFIGURATIONS[name].options.use_liger_kernel


def write_line(out: Path, line: dict[str, Any]) -> None:
    """Append a line."""
    with out.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


# -- the others --------------------------------------------------------------------------------------------------------


def work(handed_on: dict[str, Any]) -> None:
    """Run configurations one after the other, as one of the ranks."""
    import torch
    import torch.distributed as dist

    from hf_qlora_fsdp import ranks
    from hf_qlora_fsdp.rehearsal import workers as rehearsal_ranks

    ranks.join_process_group("cuda" if torch.cuda.is_available() else "cpu")
    # One measurement will do: the card is the same.
    rehearsal_ranks.measure_matmul_rate = functools.cache(rehearsal_ranks.measure_matmul_rate)
    for name in handed_on["names"]:
        goes_on = torch.tensor(time.time() + CONFIGURATIONS[name].seconds < handed_on["deadline"])
        dist.broadcast(goes_on, src=0)
        if not goes_on:
            continue
        try:
            line = run_one(name, handed_on["tiny"], handed_on["pictures"])
        except Exception as error:
            write_line(Path(handed_on["out"]), {"name": name, "failed": f"{type(error).__name__}: {error}"})
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the other rank may be waiting in a collective, and only new processes can go on
        if ranks.rank() == 0:
            write_line(Path(handed_on["out"]), line)
    dist.destroy_process_group()


def run_one(name: str, tiny: bool, pictures: bool) -> dict[str, Any]:
    """Run one configuration, and return what was measured of it; on ranks other than 0, nothing."""
    import torch

    from hf_qlora_fsdp import ranks
    from hf_qlora_fsdp.memory_trace import host_bytes
    from hf_qlora_fsdp.rehearsal.workers import Rehearsal

    began = time.monotonic()
    configuration = CONFIGURATIONS[name]
    options = configuration.options
    on_gpu = torch.cuda.is_available()
    config = TRUTH_SHAPES[configuration.shape]
    if tiny:
        config = config | {key: value for key, value in _SMALLER.items() if key in config}
        options.seq = 64
        options.cpu_offload_layers = options.cpu_offload_layers and 1
    if not on_gpu:
        options.activation_offloading = options.use_liger_kernel = False
    clear()
    before = gather({"outside": outside_bytes(), "allocated": torch.cuda.memory_allocated() if on_gpu else 0}, max)
    host_before = gather(dict(zip(("anonymous", "file", "shared"), host_bytes(), strict=True)), sum)
    with tempfile.TemporaryDirectory() as folder:
        options.model = f"{folder}/config.json"
        Path(options.model).write_text(json.dumps(config))
        rehearsal.check(options)
        with recorded(pictures and on_gpu):
            outcome = Rehearsal(options).run()
            after = gather({"outside": outside_bytes()}, max)
            picture = take_picture(outcome) if pictures and on_gpu and outcome else None
    clear()
    if ranks.rank() != 0 or outcome is None:
        return {}
    trace = outcome.pop("trace")
    line = {
        "name": name,
        "shape": configuration.shape,
        "config": config,
        "before": before,
        "host_before": host_before,
        "outside_bytes": after["outside"],
        "least_steady_bytes": least_steady_bytes(outcome, trace),
        "wall_seconds": time.monotonic() - began,
        "picture": picture,
    }
    return line | outcome | {"model": configuration.shape}


def clear() -> None:
    """Give back all that the configuration before has left, so that this one begins with an empty card."""
    import torch

    gc.collect()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError):  # page-locked memory, which torch keeps as it keeps a card's
            torch._C._host_emptyCache()


def outside_bytes() -> int:
    """Return what is in use on this card beside what torch's allocator holds."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def gather(mine: dict[str, int], combine: Any) -> dict[str, int]:
    """Return what all ranks say, combined."""
    import torch.distributed as dist

    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {name: combine(theirs[name] for theirs in everybody) for name in mine}


def least_steady_bytes(outcome: dict[str, Any], trace: dict[str, Any]) -> int:
    """Return the least that rank 0 had allocated between two steps: shards, adapter and optimizer, and nothing else."""
    steady = outcome["phases"][-1]["began"]
    samples = trace["ranks"][0]
    return min((sample[1] for sample in samples if sample[0] >= steady), default=0)


# -- a picture of the peak ---------------------------------------------------------------------------------------------

_TELLING = ("hf_qlora_fsdp/", "transformers/", "trl/", "peft/", "liger_kernel/", "bitsandbytes/", "fsdp/_fully_shard/")
_TELLING += ("utils/checkpoint.py", "/optim/", "accelerate/", "autograd/graph.py", "nn/utils/clip_grad.py")
_MUTE = ("transformers/trainer.py", "rehearsal", "benchmarks/", "transformers/utils/generic.py", "peft/peft_model.py")


@contextlib.contextmanager
def recorded(wanted: bool) -> Any:
    """Record every allocation with the Python that asked for it."""
    import torch

    if wanted:
        torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=10**7)
    try:
        yield
    finally:
        if wanted:
            torch.cuda.memory._record_memory_history(enabled=None)


def take_picture(outcome: dict[str, Any], num_lines: int = 25) -> dict[str, Any]:
    """Return what was alive at the peak of the steady phase, summed by the code that asked for it."""
    import torch

    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    began = outcome["phases"][-1]["began"] * 1e6
    alive: dict[int, dict[str, Any]] = {}
    total = most = 0
    at_peak: list[dict[str, Any]] = []
    for until_peak in (False, True):  # the first pass finds the peak, the second one what is alive there
        alive.clear()
        total = 0
        for event in events:
            if event["action"] == "alloc":
                alive[event["addr"]] = event
                total += event["size"]
            elif event["action"] == "free_requested" and event["addr"] in alive:
                total -= alive.pop(event["addr"])["size"]
            if event["time_us"] >= began and not until_peak:
                most = max(most, total)
            elif event["time_us"] >= began and total == most:
                at_peak = list(alive.values())
                break
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in at_peak:
        where = describe_frames(event["frames"])
        sizes[where] += event["size"]
        counts[where] += 1
    lines = [[size, counts[where], where] for where, size in sizes.most_common(num_lines)]
    print(f"{most:,} bytes at the peak, of which", flush=True)
    for size, count, where in lines:
        print(f"{size:>16,} in {count:>5} {where}", flush=True)
    return {"bytes": most, "lines": lines}


def describe_frames(frames: list[dict[str, Any]]) -> str:
    """Return the innermost frames that tell something, the innermost one first."""
    telling = [
        frame
        for frame in frames
        if any(part in frame["filename"] for part in _TELLING) and not any(part in frame["filename"] for part in _MUTE)
    ]
    shown = telling[:4] or frames[:4]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in shown) or "nobody's"


# -- what was measured -------------------------------------------------------------------------------------------------


def summarize(line: dict[str, Any]) -> str:
    """Return one line for people."""
    if "failed" in line:
        return f"{line['name']:<20} failed: {line['failed'][:120]}"
    steady = line["phases"][-1]["peaks"]
    sizes = ", ".join(f"{name} {steady[name] / GIB:.2f}" for name in ("allocated", "reserved", "used", "host"))
    return (
        f"{line['name']:<20} {sizes} GiB; {line['seconds_per_step']:.3g} s a step, {line['wall_seconds']:.0f} s in all"
    )


def record(lines: list[dict[str, Any]], results: Path) -> None:
    """Append the figures to the results."""
    with results.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        for line in lines:
            if "failed" in line:
                continue
            figures = {
                f"{kind}, {phase['name']}": (phase["peaks"][kind] / GIB, "GiB")
                for phase in line["phases"]
                for kind in ("allocated", "reserved", "used", "host")
            }
            figures["allocated, least"] = line["least_steady_bytes"] / GIB, "GiB"
            figures["outside the allocator"] = line["outside_bytes"] / GIB, "GiB"
            figures["host, before"] = sum(line["host_before"].values()) / GIB, "GiB"
            figures["load"] = line["load_seconds"], "s"
            figures["step"] = line["seconds_per_step"], "s"
            for claim, (value, unit) in figures.items():
                writer.writerow(
                    {
                        "date": datetime.date.today().isoformat(),
                        "claim": f"planner {line['name']}: {claim}",
                        "value": f"{value:.5g}",
                        "unit": unit,
                        "command": f"python benchmarks/planner_truth.py --only {line['name']}",
                        "hardware": f"{line['world_size']}x {line['device']}",
                        "versions": " ".join(f"{name}=={version}" for name, version in line["versions"].items()),
                    }
                )


if __name__ == "__main__":
    if is_worker():
        work(json.loads(sys.argv[1]))
    else:
        sys.exit(main())

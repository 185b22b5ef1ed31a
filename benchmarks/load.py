"""Claim: loading takes little longer than reading the checkpoint once, and a third of that from the shard cache.

Writes a checkpoint of the shapes of Llama-3-8B (16 GB, random), then loads it over two ranks, each time in new
processes and with no byte of any file in the page cache:

    read          all bytes of the checkpoint, by many threads, into nothing: what the disk can do
    load          read, quantised, sharded; no shard cache
    first load    the same, and the shard cache is written
    cached load   4 bits, from the shard cache

A load's time is that of the slower rank, from the call to the sharded model; starting Python and CUDA is not in it.
Figures are appended to `results.csv`. `--tiny` does it on a CPU with a model of a few kilobytes.

    python benchmarks/load.py --folder /scratch

On two H200 with a disk that reads 1.5 GB/s it takes 160 s: one minute for writing the checkpoint, 11 s for reading it,
4 to 13 s for a load, and as much again for starting Python and CUDA each time.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from offload import SHAPES
from promises import COLUMNS, RESULTS
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_qlora_fsdp.launch import default_num_processes, is_worker, run_workers

FILE_BYTES = 4 << 30
BLOCK_BYTES = 1 << 24
NUM_READERS = 16
MOST_OF_READING, LEAST_FASTER = 1.5, 3
MOST_OF_HALF = 1.05  # whole tensors are dealt out, so parts differ by one
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def main() -> int:
    """Write, read, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where 25 GB go, on the disk that is measured (a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model, cache = Path(scratch, "model"), Path(scratch, "cache")
        write_checkpoint(model, SHAPES["tiny" if options.tiny else "llama-3-8b"])
        size = count_bytes(model)
        forget(model)
        rows = [("checkpoint", size / 1e9, "GB"), ("read", read_everything(model), "s")]
        for name, folder in (("load", None), ("first load", cache), ("cached load", cache)):
            forget(Path(scratch))
            reports = load(model, folder)
            seconds = max(report["seconds"] for report in reports)
            rows += [
                (name, seconds, "s"),
                *((f"{name}: rank {r} read", report["bytes_read"] / 1e9, "GB") for r, report in enumerate(reports)),
            ]
            rows.append((f"{name}: peak on a card", max(report["peak"] for report in reports) / 2**30, "GiB"))
        rows.append(("shard cache", count_bytes(cache) / 1e9, "GB"))
    figures = {name: value for name, value, _ in rows}
    rows.append(("load, by reading", figures["load"] / figures["read"], "times"))
    rows.append(("cached load, by first load", figures["first load"] / figures["cached load"], "times faster"))
    for name, value, unit in rows:
        print(f"{name:28} {value:10.3f} {unit}")
    record(rows, options.results)
    faults = [] if options.tiny else judge(figures)
    print(f"NOT KEPT: {', '.join(faults)}" if faults else "ran, with a tiny model" if options.tiny else "kept")
    return 1 if faults else 0


def judge(figures: dict[str, float]) -> list[str]:
    """Return what was promised and not kept."""
    most = max(value for name, value in figures.items() if name.startswith("load: rank"))
    promises = {
        f"a load takes at most {MOST_OF_READING} times as long as reading": figures["load"]
        <= MOST_OF_READING * figures["read"],
        f"a cached load is {LEAST_FASTER} times faster": figures["first load"] >= LEAST_FASTER * figures["cached load"],
        "each rank reads its part alone": most <= MOST_OF_HALF * figures["checkpoint"] / 2,
    }
    return [promise for promise, kept in promises.items() if not kept]


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Write random weights in bfloat16, in files of 4 GiB with an index, as checkpoints come."""
    folder.mkdir()
    config = AutoConfig.for_model(**shape, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(empty.items()):
        waiting[name] = torch.randn(tensor.shape, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
        if sum(tensor.nbytes for tensor in waiting.values()) > FILE_BYTES or index == len(empty) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(waiting, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(waiting, file)
            waiting = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def count_bytes(folder: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Write what is not written yet, and drop every file's pages from memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_everything(folder: Path) -> float:
    """Return the seconds that reading all weights takes, in blocks and by many threads."""

    def read(file: Path, start: int) -> None:
        with file.open("rb", buffering=0) as stream:
            os.preadv(stream.fileno(), [bytearray(BLOCK_BYTES)], start)

    began = time.monotonic()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        blocks = [
            pool.submit(read, file, start)
            for file in folder.rglob("*.safetensors")
            for start in range(0, file.stat().st_size, BLOCK_BYTES)
        ]
        for block in blocks:
            block.result()
    return time.monotonic() - began


def load(model: Path, cache: Path | None) -> list[dict[str, Any]]:
    """Load in new processes, and return what each rank reports."""
    with tempfile.TemporaryDirectory() as folder:
        failed = run_workers("load", [str(model), str(cache or ""), folder], max(2, default_num_processes()))
        if failed:
            raise RuntimeError(f"These ranks failed, with these exit codes: {failed}.")
        return [json.loads(file.read_text()) for file in sorted(Path(folder).iterdir())]


def take_part(model: str, cache: str, folder: str) -> int:
    """Load as one of the ranks."""
    from hf_qlora_fsdp.loader import load_quantized_model
    from hf_qlora_fsdp.ranks import join_process_group, rank

    on_gpu = torch.cuda.is_available()
    join_process_group("cuda" if on_gpu else "cpu")
    report = load_quantized_model(model, shard_cache=bool(cache), shard_cache_dir=cache or None).load_report
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    figures = {"seconds": report.seconds, "bytes_read": report.bytes_read, "peak": peak}
    Path(folder, f"{rank()}.json").write_text(json.dumps(figures))
    return 0


def record(rows: list[tuple[str, float, str]], results: Path) -> None:
    """Append the figures."""
    hardware = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"
    versions = " ".join(f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES)
    command = "python benchmarks/load.py" + (" --tiny" if "--tiny" in sys.argv else "")
    new = not results.exists()
    with results.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(COLUMNS)
        today = datetime.date.today().isoformat()
        writer.writerows(
            [today, f"load 8b: {name}", f"{value:.4g}", unit, command, hardware, versions] for name, value, unit in rows
        )


if __name__ == "__main__":
    if is_worker():
        sys.exit(take_part(*sys.argv[1:]))
    os.chdir(Path(__file__).parent)  # where `-m load` is found
    sys.exit(main())

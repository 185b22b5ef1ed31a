"""What a checkpoint may be continued with: the run that wrote it, and no other.

Three things must be the same, or resuming is refused with both values named:

* the **base model**, by a checksum of its weights as they were trained against, so that a moved folder is still the
  same model, and another one of the same shape is not;
* the **adapter**: its rank, its scaling, what it is on;
* the **sequences a step**, by which the place in the data is counted (`resumable.py`).

Two may differ, and are said: the versions of the libraries, and the **data**. People do add rows to a dataset and go
on, so that is no error; but the steps that are skipped are then steps of another order, and the run is not the one that
was saved. Data are recognised by what the model is given: the number of rows after tokenising and packing, their
columns, and a hash of rows spread evenly over them. The fingerprint that `datasets` keeps would not do: it changes
where a cache is built anew or the job runs on another machine. Single rows that were edited may go unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils.hub import cached_file, extract_commit_hash

from ..ranks import share_of_cores

_PACKAGES = ("hf_qlora_fsdp", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
_CHUNK_BYTES = 1 << 20  # what a core's cache holds with the factors
_MAX_CORES = 8
_PRIME = 65_521  # the largest below 2^16, as in Adler-32
_NUM_SAMPLES = 64


def describe_run(
    model: nn.Module,
    *,
    base_model: str,
    revision: str | None,
    peft_configs: Mapping[str, Any],
    sequences_per_step: int,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect what a checkpoint belongs to. A collective, on the first call for a model.

    Args:
        model (`nn.Module`): The sharded model.
        base_model (`str`): Its name or folder.
        revision (`str`, *optional*): Its commit on the Hub.
        peft_configs (`Mapping[str, LoraConfig]`): The adapters that are trained, by name.
        sequences_per_step (`int`): Batch size times accumulation times ranks.
        data (`Mapping`): Of `describe_data`.
    """
    return {
        "base_model": base_model,
        "revision": revision,
        "base_checksum": base_checksum(model),
        "adapters": {name: _describe_adapter(config) for name, config in peft_configs.items()},
        "sequences_per_step": sequences_per_step,
        "data": dict(data),
        "world_size": dist.get_world_size(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def check_continues(folder: str | os.PathLike[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to continue a checkpoint with another model, adapter or batch; return what else differs.

    Args:
        folder (`str`): The checkpoint, for the message.
        saved (`Mapping`): Its facts.
        now (`Mapping`): Those of this run.
    Raises:
        ValueError: They do not belong together. Names both values.
    """
    if saved["base_checksum"] != now["base_checksum"]:
        raise ValueError(
            f"{str(folder)!r} was trained on {saved['base_model']!r} (weights {saved['base_checksum']}), and the "
            f"model now is {now['base_model']!r} (weights {now['base_checksum']}). An adapter fits only the weights it "
            "was trained on. Pass the model, revision and quantisation of the checkpoint."
        )
    if set(saved["adapters"]) != set(now["adapters"]):
        raise ValueError(
            f"{str(folder)!r} holds the adapters {sorted(saved['adapters'])}, and the model now trains "
            f"{sorted(now['adapters'])}. Give the model the adapters of the checkpoint, or start a new run in another "
            "output_dir."
        )
    for adapter, config in saved["adapters"].items():
        for name, value in config.items():
            given = now["adapters"][adapter].get(name)
            if value != given:
                raise ValueError(
                    f"{str(folder)!r} was trained with {name}={value!r}, and peft_config now has {given!r} (adapter "
                    f"{adapter!r}). Its weights would not mean the same. Set {name}={value!r}, or start a new run in "
                    "another output_dir."
                )
    return [
        f"{name}: {saved['versions'].get(name)} then, {version} now"
        for name, version in now["versions"].items()
        if saved["versions"].get(name) != version
    ]


def find_commit(base_model: str, **hub: Any) -> str | None:
    """Return the commit on the Hub that a model was loaded from, as the cache tells; of a folder, `None`.

    The config of a model carried it until transformers 5.23.

    Args:
        base_model (`str`): Hub id or folder.
        **hub: `revision` and `cache_dir`, as the model was loaded with them.
    """
    try:
        return extract_commit_hash(cached_file(base_model, "config.json", local_files_only=True, **hub), None)
    except OSError:  # not in the cache: the weights were made by a script
        return None


def describe_data(dataset: Any) -> dict[str, Any]:
    """Return by what a training set is recognised: rows, columns and a hash of up to 64 rows; of a stream, columns.

    Args:
        dataset (`Dataset` or `IterableDataset`): As the model gets it, tokenised and packed.
    """
    described: dict[str, Any] = {"num_rows": None, "columns": sorted(dataset.column_names or []), "rows_sha256": None}
    if isinstance(dataset, Dataset):
        last = len(dataset) - 1
        places = sorted({last * number // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)})
        rows = dataset.with_format("arrow")[places].to_pylist()
        digest = hashlib.sha256("\n".join(repr(sorted(row.items())) for row in rows).encode())
        described |= {"num_rows": len(dataset), "rows_sha256": digest.hexdigest()}
    return described


def compare_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in what the data of a checkpoint differ from those of this run; `None` if in nothing, or if not known."""
    then, given = saved.get("data"), now["data"]
    if then is None or then == given:
        return None
    if then["num_rows"] != given["num_rows"]:
        return f"{then['num_rows'] or 'streamed'} rows then, {given['num_rows'] or 'streamed'} now"
    if then["columns"] != given["columns"]:
        return f"columns {then['columns']} then, {given['columns']} now"
    return f"{given['num_rows']} rows then as now, but not the same or not in the same order"


def base_checksum(model: Any) -> str:
    """Return a checksum of all frozen weights, the same for any number of ranks. A collective; kept on the model.

    Each byte counts, weighted by its place in its tensor and its tensor's place in the model: 4-bit codes and scales as
    they are trained against, so another quantisation, or another order of rows, is another base.
    """
    if getattr(model, "_base_checksum", None) is None:
        with ThreadPoolExecutor(min(_MAX_CORES, share_of_cores())) as pool:
            mine = _sum_of_my_shards(model, _ByteSum(pool))
        totals: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(totals, mine)
        model._base_checksum = f"{sum(totals) % (1 << 64):016x}"
    return model._base_checksum


def _sum_of_my_shards(model: Any, sum_bytes: _ByteSum) -> int:
    total = 0
    for index, parameter in enumerate(parameter for parameter in model.parameters() if not parameter.requires_grad):
        if isinstance(parameter, DTensor):
            local, num_rows = parameter.to_local(), parameter.shape[0]
            start = min(dist.get_rank() * -(-num_rows // dist.get_world_size()), num_rows)
            offset = start * parameter.numel() * parameter.element_size() // max(num_rows, 1)
        elif dist.get_rank() == 0:
            local, offset = parameter, 0
        else:
            continue
        total += (index + 1) * sum_bytes(local, offset)
    return total


class _ByteSum:
    """Sums a tensor's bytes, each times 1 more than its place modulo a prime.

    The factors of a chunk are a stretch of a table, so that a byte costs one product. Host memory, of which an
    offloaded model can have a hundred gigabytes a rank, is summed by several threads (the pool begins them when it is
    first asked).
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._factors = torch.arange(_PRIME + _CHUNK_BYTES, dtype=torch.int32) % _PRIME + 1

    def __call__(self, tensor: torch.Tensor, offset: int) -> int:
        """Return the sum, for a tensor before whose first byte lie `offset` others."""
        chunks = tensor.detach().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES)
        firsts = [(offset + index * _CHUNK_BYTES) % _PRIME for index in range(len(chunks))]
        self._factors = self._factors.to(tensor.device)
        if tensor.device.type == "cpu" and len(chunks) > 1:
            return sum(map(int, self._pool.map(self._sum, chunks, firsts)))
        return int(sum(map(self._sum, chunks, firsts), start=torch.zeros((), dtype=torch.int64)))

    def _sum(self, chunk: torch.Tensor, first: int) -> torch.Tensor:
        return (self._factors[first : first + chunk.numel()] * chunk).sum()


def _describe_adapter(config: Any) -> dict[str, Any]:
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets if isinstance(targets, str) or targets is None else sorted(targets),
        "modules_to_save": sorted(config.modules_to_save or []),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "trainable_token_indices": config.trainable_token_indices,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # this package, run from its source tree

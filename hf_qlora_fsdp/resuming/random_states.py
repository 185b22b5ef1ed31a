"""The states of all random generators, as tensors: no pickle is needed to save them, and none is trusted to load them.

Dropout and whatever else draws at random must go on where it stopped, on every rank. States are small (a few
kilobytes), so those of all ranks lie in one file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ..ranks import fail_together

FILE = "random_states.safetensors"


def save_random_states(folder: Path) -> None:
    """Write the states of every rank. A collective; rank 0 writes."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _collect())
    with fail_together(f"saving {FILE}"):
        if dist.get_rank() == 0:
            tensors: dict[str, torch.Tensor] = {}
            values: dict[str, str] = {}
            for rank, (states, rest) in enumerate(gathered):
                tensors |= {f"{rank}.{name}": state for name, state in states.items()}
                values[str(rank)] = json.dumps(rest)
            save_file(tensors, folder / FILE, metadata=values)


def load_random_states(folder: Path) -> bool:
    """Set this rank's generators as they were; return whether it could be done.

    With another number of ranks it cannot: each rank had a state of its own.
    """
    with safe_open(folder / FILE, framework="pt") as handle:
        values = handle.metadata()
        if len(values) != dist.get_world_size():
            return False
        rank = dist.get_rank()
        states = {name: handle.get_tensor(f"{rank}.{name}") for name in ("torch", "numpy", "python")}
        version, gauss_next, has_gauss, position, cached_gaussian = json.loads(values[str(rank)])
        if torch.cuda.is_available() and f"{rank}.cuda" in handle.keys():  # noqa: SIM118, a handle is no mapping
            torch.cuda.set_rng_state(handle.get_tensor(f"{rank}.cuda"))
    torch.set_rng_state(states["torch"])
    keys = states["numpy"].numpy().view(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached_gaussian))
    random.setstate((version, tuple(states["python"].tolist()), gauss_next))
    return True


def _collect() -> tuple[dict[str, torch.Tensor], list]:
    """Return this rank's states: the arrays as tensors, the few numbers besides as a list."""
    version, internal, gauss_next = random.getstate()
    keys: Any  # numpy says that it may be text, which it is not for its standard generator
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.view(np.int32).copy()),
        "python": torch.tensor(internal, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states, [version, gauss_next, int(has_gauss), int(position), float(cached_gaussian)]

"""Random numbers go on where they stopped, on every rank, and without a pickle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from hf_qlora_fsdp.resuming.random_states import FILE, load_random_states, save_random_states


def draw() -> list[float]:
    return [torch.rand(1).item(), torch.randn(1).item(), np.random.rand(), np.random.randn(), random.random(),
            random.gauss(0, 1)]  # fmt: skip


def save_and_go_on(rank: int, folder: str) -> tuple[list[float], list[float], bool]:
    torch.manual_seed(rank)
    np.random.seed(rank)
    random.seed(rank)
    draw()  # leaves the second half of a pair of normal numbers in numpy's and Python's caches
    save_random_states(Path(folder))
    torch.distributed.barrier()
    first = draw()
    torch.manual_seed(7)
    draw()
    loaded = load_random_states(Path(folder))
    return first, draw(), loaded


def test_every_rank_goes_on_with_its_own_numbers(ranks, tmp_path):
    results = ranks.run(save_and_go_on, str(tmp_path))
    for first, again, loaded in results:
        assert loaded and first == again
    assert results[0][0] != results[1][0]
    with safe_open(tmp_path / FILE, framework="pt") as handle:
        assert set(handle.metadata()) == {"0", "1"}


def load_elsewhere(rank: int, folder: str) -> tuple[bool, bool]:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load_random_states(Path(folder))
    return loaded, torch.equal(before, torch.get_rng_state())


def test_another_number_of_ranks_draws_anew(ranks, tmp_path):
    from tests.distributed import run_ranks

    ranks.run(save_and_go_on, str(tmp_path))
    assert run_ranks(load_elsewhere, 1, str(tmp_path)) == [(False, True)]

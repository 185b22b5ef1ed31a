"""What every test starts from: no network, one thread, two ranks to share, markers that skip themselves and say why."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed import RankPool

# Read by the libraries at import time, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No model that a test loads is kept on disk, least of all in the user's own cache.
os.environ["HF_QLORA_FSDP_SHARD_CACHE_DIR"] = ""
# One thread, as the ranks have: a sum then has the same order, and so the same rounding, in a test and on its ranks.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two gloo ranks that the session shares: `ranks.run(fn, *args)` lists what `fn(rank, *args)` returned on each."""
    with RankPool(world_size=2) as pool:
        yield pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip(item, slow_wanted=config.getoption("--slow"))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def reason_to_skip(item: pytest.Item, slow_wanted: bool) -> str | None:
    num_needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    if num_needed:
        import torch  # only where a marker asks, so that the light tests stay light

        if torch.cuda.device_count() < num_needed:
            return f"needs {num_needed} CUDA device(s), found {torch.cuda.device_count()}"
    if item.get_closest_marker("slow") and not slow_wanted:
        return "takes minutes; run with --slow"
    return None

"""The test kit for ranks, tested: results come home; what goes wrong on a rank is heard, and nothing waits for ever."""

from __future__ import annotations

import os
import pickle
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankPool, run_ranks


def describe(rank: int, *args: object) -> dict[str, object]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MARK")
    return {
        "rank": rank,
        "args": args,
        "group": (dist.get_rank(), dist.get_world_size(), dist.get_backend()),
        "env": {name: os.environ.get(name) for name in names},
        "num_threads": torch.get_num_threads(),
        "num_cuda": torch.cuda.device_count(),
    }


def gathered_sum(rank: int, start: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return os.getpid(), total


def raise_on_one(rank: int, culprit: int) -> None:
    if rank == culprit:
        raise KeyError("the shard is missing")
    dist.barrier()


def raise_on_all(rank: int) -> None:
    raise ValueError(f"rank {rank} has a reason of its own")


def hang_on_one(rank: int, culprit: int) -> None:
    while rank == culprit:
        time.sleep(0.1)


def exit_on_one(rank: int, culprit: int) -> None:
    if rank == culprit:
        os._exit(7)
    dist.barrier()


def return_unpicklable(rank: int) -> object:
    return lambda: rank


def destroy_group(rank: int) -> int:
    dist.destroy_process_group()
    return os.getpid()


def leave_traces(rank: int) -> float:
    os.environ["MARK"] = "left behind"
    from accelerate import Accelerator

    Accelerator(cpu=True, mixed_precision="bf16")
    return torch.rand(()).item()


def build_plain_accelerator(rank: int) -> tuple[str, int, str | None, float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    return accelerator.mixed_precision, accelerator.num_processes, os.environ.get("MARK"), torch.rand(()).item()


def warn(rank: int) -> None:
    warnings.warn(f"rank {rank} is uneasy", UserWarning, stacklevel=1)


def device_of_rank(rank: int) -> tuple[int, float]:
    total = torch.ones((), device="cuda")
    dist.all_reduce(total)
    on_cpu = torch.ones(())
    dist.all_reduce(on_cpu)
    return torch.cuda.current_device(), total.item() + on_cpu.item()


def test_run_ranks_sets_the_stage_and_returns_in_order() -> None:
    results = run_ranks(describe, 3, "a", 1, env={"MARK": "given"})
    assert [result["rank"] for result in results] == [0, 1, 2]
    for rank, result in enumerate(results):
        assert result["args"] == ("a", 1)
        assert result["group"] == (rank, 3, "gloo")
        assert result["env"] == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "OMP_NUM_THREADS": "1",
            "MARK": "given",
        }
        assert result["num_threads"] == 1
        assert result["num_cuda"] == 0


def test_a_local_function_is_refused_before_a_process_starts() -> None:
    with pytest.raises(
        (pickle.PicklingError, AttributeError), match="<lambda>"
    ):  # which of the two depends on the Python
        run_ranks(lambda rank: rank)


def test_pool_keeps_its_processes(ranks: RankPool) -> None:
    first = ranks.run(gathered_sum, 10)
    second = ranks.run(gathered_sum, 20)
    assert [total.item() for _, total in first + second] == [21, 21, 41, 41]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


def test_a_raising_rank_is_reported_and_the_others_end(ranks: RankPool) -> None:
    before = [pid for pid, _ in ranks.run(gathered_sum, 0)]
    with pytest.raises(RuntimeError) as caught:
        ranks.run(raise_on_one, 1)
    message = str(caught.value)
    assert "rank 1 failed" in message
    assert "rank 0 failed" not in message
    assert 'raise KeyError("the shard is missing")' in message
    assert not any(is_running(pid) for pid in before)
    # and the pool works again, with new processes
    after = [pid for pid, _ in ranks.run(gathered_sum, 0)]
    assert not set(before) & set(after)


def test_all_raising_ranks_are_reported(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 has a reason of its own.*rank 1 has a reason of its own"):
        ranks.run(raise_on_all)


def test_a_hanging_rank_times_out_and_is_located(ranks: RankPool) -> None:
    pids = [pid for pid, _ in ranks.run(gathered_sum, 0)]
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        ranks.run(hang_on_one, 1, timeout=1)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "still busy: rank 1 of 2" in message
    assert "in hang_on_one" in message
    assert not any(is_running(pid) for pid in pids)


def test_a_start_that_takes_too_long_times_out() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="still busy: rank 0, 1 of 2"):
        run_ranks(describe, 2, timeout=0.05)
    assert time.monotonic() - start < 5


def test_a_rank_that_dies_is_reported(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:\nthe process ended with exit code 7"):
        ranks.run(exit_on_one, 1)


def test_a_result_that_cannot_travel_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed.*return_unpicklable"):
        ranks.run(return_unpicklable)


def test_pool_replaces_ranks_that_left_their_group(ranks: RankPool) -> None:
    before = ranks.run(destroy_group)
    after = [pid for pid, _ in ranks.run(gathered_sum, 0)]
    assert not set(before) & set(after)


def test_a_run_leaves_nothing_behind_for_the_next(ranks: RankPool) -> None:
    (drawn, _) = ranks.run(leave_traces)
    assert ranks.run(build_plain_accelerator) == [("no", 2, None, drawn)] * 2


def test_ranks_take_the_warning_filters_of_the_test(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match="UserWarning: rank 0 is uneasy"):
        ranks.run(warn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank . is uneasy")
        assert ranks.run(warn) == [None, None]


@pytest.mark.multigpu
def test_each_rank_has_its_own_gpu() -> None:
    assert run_ranks(device_of_rank, 2, backend="cpu:gloo,cuda:nccl") == [(0, 4.0), (1, 4.0)]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

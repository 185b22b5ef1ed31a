"""Processes that srun starts find each other, with nothing but srun's own variables."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from hf_qlora_fsdp.slurm import expand_counts, first_host, read_step

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def step(rank: int, per_node: int = 2, num_nodes: int = 1, **changes: str) -> dict[str, str]:
    """What srun sets for one task of a step, as its manual has it."""
    return {
        "SLURM_JOB_ID": str(4000 + os.getpid() % 1000),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": f"gpu-[07-{6 + num_nodes:02d}]" if num_nodes > 1 else "gpu-07",
        "SLURM_STEP_NUM_TASKS": str(per_node * num_nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{num_nodes})" if num_nodes > 1 else str(per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_LOCALID": str(rank % per_node),
    } | changes


def test_places_on_two_nodes() -> None:
    places = [read_step(step(rank, 4, 2)) for rank in range(8)]
    assert [(int(place["RANK"]), int(place["LOCAL_RANK"])) for place in places] == [(i, i % 4) for i in range(8)]
    shared = {tuple(place[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")) for place in places}
    assert shared == {("8", "4", "gpu-07")}
    assert len({place["MASTER_PORT"] for place in places}) == 1


def test_two_steps_do_not_meet() -> None:
    ports = {
        read_step(step(0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number)))["MASTER_PORT"]
        for job in (11, 12)
        for number in (0, 1, 2)
    }
    assert len(ports) == 6
    assert all(1024 < int(port) < 32768 for port in ports)


def test_what_the_user_set_stays() -> None:
    place = read_step(step(0, MASTER_ADDR="ib-07", MASTER_PORT="2345"))
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("ib-07", "2345")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        step(0, per_node=1),  # a shell in srun --pty
        step(0) | {"RANK": "3", "LOCAL_RANK": "1"},  # torchrun in a step
    ],
)
def test_nothing_is_read_where_srun_started_no_ranks(environ: dict[str, str]) -> None:
    assert read_step(environ) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_PROCID": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"},  # dealt out like cards
    ],
)
def test_ranks_that_do_not_lie_in_blocks_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--ntasks-per-node N --distribution=block"):
        read_step(step(2, 2, 2) | changes)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2", [1, 2]), ("16(x3)", [16, 16, 16])]
)
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-07", "gpu-07"),
        ("gpu-[07-09,12],login1", "gpu-07"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]node[3,5]-ib", "rack1node3-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_two_tasks_form_a_group() -> None:
    """The group that the trainer joins, and what is asked before there is one."""
    script = (
        "import os, torch, torch.distributed as dist\n"
        "from hf_qlora_fsdp import launch, ranks\n"
        "before = launch.is_worker(), ranks.rank(), ranks.world_size(), ranks.local_world_size()\n"
        "ranks.join_process_group('cpu', 30)\n"
        "x = torch.tensor([10.0 + dist.get_rank()]); dist.all_reduce(x)\n"
        "print(*before, x.item(), os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE'])\n"
        "dist.destroy_process_group()\n"
    )
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    tasks: list[Any] = [
        subprocess.Popen([sys.executable, "-c", script], env=plain | step(rank), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [task.communicate(timeout=90)[0].split() for task in tasks]
    assert said == [["True", "0", "2", "2", "21.0", "0", "2"], ["True", "1", "2", "2", "21.0", "1", "2"]]

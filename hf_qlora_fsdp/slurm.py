"""What `srun` tells its tasks about their places, in the words of torch's launchers.

torchrun and `accelerate launch` set RANK, WORLD_SIZE and their like, which torch, transformers and accelerate all read.
srun starts as many processes just as well, but tells them in variables of its own. Here these are read. A task of a
step is a rank, so one task a card is what to ask for:

    srun --ntasks-per-node 8 --gpus-per-node 8 hf-qlora-fsdp train --config config.yaml

A batch script, a shell under `srun --pty` and a step of one task have such variables too, but no other ranks to meet:
there nothing is read, and neither is where a launcher has spoken already, as torchrun in a step of one task a node.

Source:
    https://slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES"
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS, _STEPS_A_JOB = 15_000, 16_000, 16
"""Below the ports that Linux gives out by itself (32768 and up), so that nothing sits on one by chance."""


def read_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a launcher, for a task of a step.

    Args:
        environ (`Mapping[str, str]`): The environment, e.g. `os.environ`.
    Returns:
        `dict[str, str]`: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the last two as
            they are, if they are set. Empty if srun has not started several ranks.
    Raises:
        ValueError: The tasks do not lie on the nodes in equal blocks, as ranks have to.
    """
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if num_tasks < 2 or "RANK" in environ or "LOCAL_RANK" in environ:
        return {}
    sizes = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
    node = int(environ["SLURM_NODEID"])
    if len(set(sizes)) > 1 or rank != node * sizes[0] + local_rank:
        raise ValueError(
            f"srun has put {environ['SLURM_STEP_TASKS_PER_NODE']} tasks on its nodes, and task {rank} is number "
            f"{local_rank} on node {node}. Ranks that share a host share the work of loading, so they have to lie in "
            "blocks of one size. Write srun --ntasks-per-node N --distribution=block."
        )
    host = first_host(environ["SLURM_STEP_NODELIST"]) if len(sizes) > 1 else "127.0.0.1"
    step = int(environ["SLURM_JOB_ID"]) * _STEPS_A_JOB + int(environ["SLURM_STEP_ID"])
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(sizes[0]),
        "MASTER_ADDR": environ.get("MASTER_ADDR", host),
        "MASTER_PORT": environ.get("MASTER_PORT", str(_FIRST_PORT + step % _NUM_PORTS)),
    }


def expand_counts(text: str) -> list[int]:
    """Return the tasks of each node: `expand_counts("4(x2),3")` is `[4, 4, 3]`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first of the nodes, where rank 0 is: `first_host("gpu-[07-09,12],login1")` is `"gpu-07"`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0]) if match else nodes

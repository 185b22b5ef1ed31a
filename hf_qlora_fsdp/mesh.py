"""The ranks that share a model, and the proof that what one gathers from the others is what they had.

Packed 4-bit weights are gathered as floating numbers that they are not, NaN among them. Whether such a pattern comes
back as it was depends on kernels of torch and NCCL, so all of them are tried before a model is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import compat
from .compat.torch_gather_bytes import PATCH as GATHER_BYTES
from .errors import ShardingError
from .sharding_policy import ShardingPolicy
from .units import format_dtype


def make_mesh(checked: bool = True) -> DeviceMesh:
    """Return the one-dimensional mesh of all ranks, on the accelerator where there is one.

    Args:
        checked (`bool`): Whether to gather over it now. NCCL starts with the first collective and takes up to a second
            for it, so who has something to do meanwhile calls `check_gathering` later.
    Raises:
        ShardingError: What is gathered over it is not what was sharded.
    """
    device_type = "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"
    if device_type == "cuda":
        compat.apply(GATHER_BYTES)
    mesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    if checked:
        check_gathering(mesh)
    return mesh


def check_gathering(mesh: DeviceMesh) -> None:
    """Gather every pattern of 16 bits, viewed as numbers of each dtype, and see that each comes back as it was.

    Whether a copy is one of bits or of numbers depends on kernels that change from version to version, and a wrong one
    shows in no loss. So it is tried on the machine that trains.

    Raises:
        ShardingError: One does not.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _check_gathering(mesh, dtype)


def _check_gathering(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32, device=mesh_device(mesh)).to(torch.int16)
    probe: Any = nn.Module()
    probe.weight = nn.Parameter(patterns.view(dtype).clone(), requires_grad=False)
    ShardingPolicy(param_dtype=dtype).fully_shard(probe, mesh, set())
    probe.unshard()
    if not torch.equal(probe.weight.view(torch.int16), patterns):
        raise ShardingError(
            f"torch {torch.__version__} changes bytes while it gathers {format_dtype(dtype)} on {mesh.device_type}, so "
            "packed 4-bit weights would be garbage. Install a version from constraints.txt, or report this."
        )


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")

"""FSDP2 changes bytes that read as NaN while it gathers them on GPUs.

Before an all-gather, FSDP2 copies the shards of a unit into one buffer with `torch._foreach_copy_`. On CUDA that kernel
converts each 16-bit number to float32 and back, which leaves every number as it is and turns every NaN into *the* NaN.
Packed 4-bit weights, viewed as bfloat16, are full of them: 254 of 65,536 patterns are NaN with a payload, four codes
each. A model then trains on weights of which one in 65 is wrong; the loss looks plausible, and the gradients are off by
10 to 20 percent.

FSDP2 has a path for units of mixed dtypes that copies all of it as bytes. This patch takes that path always.
"""

from collections.abc import Callable
from typing import Any

from . import Patch


def _build(original: Callable) -> Callable:
    def _get_all_gather_input_metadatas(param_all_gather_inputs: Any) -> Any:
        import torch

        dtypes, numels, _ = original(param_all_gather_inputs)
        return dtypes, numels, torch.uint8

    return _get_all_gather_input_metadatas


PATCH = Patch(
    name="torch-gather-bytes",
    target="torch.distributed.fsdp._fully_shard._fsdp_collectives:_get_all_gather_input_metadatas",
    affects="torch>=2.11",
    symptom="On GPUs, FSDP2 changes packed 4-bit weights whose bytes read as NaN while it gathers them.",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py",
    remove_when="all_gather_copy_in copies 16-bit floats bit for bit on CUDA",
    build=_build,
)

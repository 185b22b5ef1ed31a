"""The file that `accelerate config` writes, read for what it says about sharding and precision.

Such a file says nothing of model and data: the command that it is handed to does. What it converts to is a part of a
file for `train`. Its options of FSDP have the meaning that they have everywhere (`translation.py`).
"""

from __future__ import annotations

from typing import Any

from ..translation import translate_fsdp
from .foreign_keys import ForeignKeys, Reason, spread

PROGRAM = "accelerate"

_PLACE = "it says where the processes run: start them with train --nproc, torchrun, accelerate launch or srun"
UNUSED: dict[str, str] = spread(
    (_PLACE, "num_processes num_machines machine_rank main_process_ip main_process_port rdzv_backend same_network"),
    (_PLACE, "gpu_ids compute_environment main_training_function debug enable_cpu_affinity mpirun_config"),
    ("it is about bfloat16 on TPUs", "downcast_bf16"),
)
_TPU: Reason = ("4-bit weights need CUDA or a CPU", "Remove it.")
_OTHER: Reason = ("FSDP2 is what shards here", "Remove it, and write distributed_type: FSDP.")
_COMPILE: Reason = ("bitsandbytes' 4-bit layers and FSDP2's hooks break the graph in every layer", "Remove it.")
REFUSED: dict[str, Reason] = spread(
    (_TPU, "tpu_name tpu_zone tpu_use_cluster tpu_use_sudo tpu_env tpu_vm command_file commands ipex_config"),
    (_OTHER, "deepspeed_config megatron_lm_config parallelism_config fp8_config"),
    (_COMPILE, "dynamo_backend dynamo_config"),
)
HARMLESS: dict[str, object] = {"dynamo_backend": "NO"}
_READ = ("distributed_type", "mixed_precision", "use_cpu", "fsdp_config")
KEYS = frozenset([*UNUSED, *REFUSED, *_READ])


def read_accelerate(file: dict[Any, Any]) -> tuple[dict[str, object], list[str]]:
    """Read a file of accelerate.

    Args:
        file (`dict`): What the YAML says.

    Returns:
        `tuple[dict[str, object], list[str]]`: Arguments of `hf-qlora-fsdp train`, and a note for each key that is not
            used.

    Raises:
        ValueError: A key is unknown, has no possible value, or cannot be honoured.
    """
    keys = ForeignKeys(PROGRAM, file)
    keys.check(KEYS)
    keys.refuse(REFUSED, HARMLESS)
    kind = str(keys.take("distributed_type", "FSDP"))
    if kind in ("NO", "False", "MULTI_GPU", "MULTI_CPU"):
        keys.note("distributed_type", kind, "the model is sharded by FSDP2 over the processes that there are")
    elif kind != "FSDP":
        raise keys.refusal("distributed_type", kind, *_OTHER)
    precision = str(keys.take("mixed_precision", "no")).lower()
    if precision not in ("no", "false", "fp16", "bf16"):
        why = "what is gathered and multiplied is bfloat16, float16 or float32"
        raise keys.refusal("mixed_precision", precision, why, "Write bf16, fp16 or no.")
    if precision in ("bf16", "fp16"):
        keys.values[precision] = True
    else:
        keys.note(
            "mixed_precision", precision, "train computes in bfloat16 unless bf16, fp16 or param_dtype say another"
        )
    if keys.take_switch("use_cpu"):
        keys.values["use_cpu"] = True
    fsdp = translate_fsdp(None, keys.take_mapping("fsdp_config"))
    keys.values.update(fsdp.values)
    keys.notes += fsdp.notes
    keys.leave(UNUSED)
    keys.finish()
    return keys.values, keys.notes

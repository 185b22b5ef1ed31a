"""4-bit QLoRA training, sharded by FSDP2 across the cards you have.

The table of contents, and nothing else: every name is imported when it is first used, so that
`import hf_qlora_fsdp` costs nothing and `hf-qlora-fsdp --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checking import check_adapter as check_adapter
    from .config import QLoRAFSDPConfig as QLoRAFSDPConfig
    from .export import save_adapter as save_adapter
    from .loader import load_quantized_model as load_quantized_model
    from .merging.merger import merge_adapter as merge_adapter
    from .notebook.launching import notebook_launch as notebook_launch
    from .planning.planner import estimate_memory as estimate_memory
    from .planning.planner import plan as plan
    from .sharding import shard_model as shard_model
    from .trainer import QLoRAFSDPTrainer as QLoRAFSDPTrainer

_HOME = {
    "QLoRAFSDPConfig": "config",
    "QLoRAFSDPTrainer": "trainer",
    "check_adapter": "checking",
    "estimate_memory": "planning.planner",
    "load_quantized_model": "loader",
    "merge_adapter": "merging.merger",
    "notebook_launch": "notebook.launching",
    "plan": "planning.planner",
    "save_adapter": "export",
    "shard_model": "sharding",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

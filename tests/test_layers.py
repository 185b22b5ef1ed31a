"""A module imports only from lower layers, and this test reads the imports to see to it.

The table below is the architecture in one place. Imports are read from the source, not from what happens to be loaded,
so one inside a function or under TYPE_CHECKING counts as well. A new module has to be given a layer here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_qlora_fsdp"

# From the bottom up. A folder is one module: what is inside it may import what else is inside it.
LAYERS = [
    {"errors", "findings", "host", "units", "orders", "slurm"},
    {"ranks"},
    {"kernels"},
    {"anatomy", "checkpoints", "compat", "fitting", "host_memory", "lora_math", "packing", "random_states", "shards"}
    | {
        "demo_model",
        "fsdp_state",
        "grouping",
        "module_walks",
        "packed_attention",
        "quantization",
        "shard_steps",
        "translation",
        "watch",
        "weights",
    },
    {"alpaca", "conversion", "expert_lora", "expert_stacks", "sharegpt"},
    {"experts"},
    {"adapter_edits", "adapters", "cache_writer", "config", "merge_folder", "recipes", "staging", "summary"},
    {"expert_recipes"},
    {"offload"},
    {"sharding_policy"},
    {"checkpointing", "fusion", "sharding"},
    {"blueprint", "sources"},
    {"cache_reader", "random_weights"},
    {"shard_cache"},
    {"cards", "matmul_share", "weighing"},
    {"layer_trial"},
    {"memory_model"},
    {"memory_estimate", "time_model"},
    {"plan_search"},
    {"planner"},
    {"plan_files", "plan_plot"},
    {"plan_report"},
    {"auto_planning"},
    {"loader", "export", "inputs", "merge_plan", "arguments", "training_data"},
    {"command_line", "continuity"},
    {"merging", "resuming", "checking"},
    {"launch", "trainer"},
    {"notebook_worker"},
    {"notebook"},
    {"memory_cap", "memory_trace", "rehearsal_plot", "shortage"},
    {"rehearsal_ranks", "rehearsal_report", "progress"},
    {"curves", "environment_checks", "gpu_checks", "host_checks", "live_test", "software_checks"},
    {"kernel_checks"},
    {"examination"},
    {"doctor", "demo", "planning", "rehearsal", "training"},
    {"cli"},
]

# Each of these works alone, in a notebook, with plain arguments; the trainer and the command line translate for them.
NEVER_SEE_CONFIG = {"planner", "loader", "sharding", "sharding_policy", "export", "merging", "checking"}

# What the package's own `__init__` defines rather than forwards.
NAMES_OF_INIT = {"__version__"}

LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}


def find_imports(source: str, location: tuple[str, ...]) -> Iterator[str]:
    """Yield what a file imports from the package: the first name below it, or `"__init__"` for the package itself.

    Args:
        source (`str`): The text of the file.
        location (`tuple[str, ...]`): The packages it lies in, from the top one on: `("hf_qlora_fsdp", "compat")`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(location[: len(location) - node.level + 1]) if node.level else []
            start += node.module.split(".") if node.module else []
            targets = [[*start, alias.name] for alias in node.names]
        else:
            continue
        for top, *rest in targets:
            if top == PACKAGE.name and not NAMES_OF_INIT.intersection(rest[:1]):
                yield rest[0] if rest else "__init__"


def find_faults(module: str, source: str, location: tuple[str, ...] = (PACKAGE.name,)) -> list[str]:
    """Say what is wrong with the imports of one file of `module`, in words for the one who wrote it."""
    if module not in LAYER_OF:
        return [f"{module} has no layer yet: add it to LAYERS"]
    faults = []
    for imported in sorted(set(find_imports(source, location)) - {module}):
        if imported not in LAYER_OF:
            faults.append(
                f"{module} imports {imported}, no module of LAYERS: import from the one that defines the name"
            )
        elif LAYER_OF[imported] >= LAYER_OF[module]:
            layers = f"layer {LAYER_OF[module]} imports from layer {LAYER_OF[imported]}, which is not lower"
            faults.append(f"{module} imports {imported}: {layers}")
        elif imported == "config" and module in NEVER_SEE_CONFIG:
            faults.append(f"{module} imports config, but takes plain arguments")
    return faults


def files_of_package() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files_of_package(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE.parent).parts
    module = path.stem if len(parts) == 2 else parts[1]
    assert find_faults(module, path.read_text(), parts[:-1]) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("units", "from .cli import main", "not lower"),
        ("planner", "from hf_qlora_fsdp.config import QLoRAFSDPConfig", "plain arguments"),
        ("planner", "import hf_qlora_fsdp.loader", "not lower"),
        ("planner", "from hf_qlora_fsdp import loader", "not lower"),
        ("planner", "from . import units, loader", "not lower"),
        ("planner", "def plan():\n    from .loader import load", "not lower"),
        ("planner", "if TYPE_CHECKING:\n    from .loader import load", "not lower"),
        ("loader", "from .config import QLoRAFSDPConfig", "plain arguments"),
        ("export", "from . import config", "plain arguments"),
        ("demo", "from hf_qlora_fsdp import QLoRAFSDPTrainer", "no module of LAYERS"),
        ("demo", "import hf_qlora_fsdp", "no module of LAYERS"),
        ("helpers", "import os", "no layer"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, fault: str) -> None:
    faults = find_faults(module, source)
    assert len(faults) == 1
    assert fault in faults[0]


def test_a_forbidden_import_is_found_inside_a_folder() -> None:
    location = (PACKAGE.name, "compat")
    allowed = "from .record import Patch\nfrom . import record\nfrom ..errors import RankError"
    assert find_faults("compat", allowed, location) == []
    assert len(find_faults("compat", "from ..trainer import QLoRAFSDPTrainer", location)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer", "from .config import QLoRAFSDPConfig"),
        ("planner", "from .units import format_bytes"),
        ("cli", "from hf_qlora_fsdp import __version__"),
        ("loader", "import torch\nfrom torch.distributed import config"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert find_faults(module, source) == []

"""A module imports only from lower layers, and this test reads the imports to see to it.

The table below is the architecture in one place. Imports are read from the source, not from what happens to be loaded,
so one inside a function or under TYPE_CHECKING counts as well. A new module has to be given a layer here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_qlora_fsdp"

# From the bottom up. A folder is one room: what is inside it may import what else is inside it, but not in a circle.
LAYERS = [
    {"errors", "files", "host", "lora_math", "memory_trace", "slurm", "translation", "units"},
    {"ranks"},
    {"compat", "conversion", "kernels", "launch", "offloading", "quantization", "settling"},
    {"anatomy", "config", "notebook", "packing", "pictures"},
    {"experts", "packed_linear", "sharding_policy"},
    {"mesh"},
    {"sharding", "speed", "summary"},
    {"export", "loading"},
    {"inputs", "loader", "merging", "planning", "resuming"},
    {"checking", "doctor", "trainer"},
    {"demo", "rehearsal", "train"},
    {"cli"},
]

# Each of these works alone, in a notebook, with plain arguments; the trainer and the command line translate for them.
NEVER_SEE_CONFIG = {"planning", "loader", "sharding", "sharding_policy", "export", "merging", "checking"}

# What the package's own `__init__` defines rather than forwards.
NAMES_OF_INIT = {"__version__"}

LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}


def find_imports(source: str, location: tuple[str, ...], top_package: str = PACKAGE.name) -> Iterator[str]:
    """Yield what a file imports from the package: the first name below it, or `"__init__"` for the package itself.

    Args:
        source (`str`): The text of the file.
        location (`tuple[str, ...]`): The packages it lies in, from the top one on: `("hf_qlora_fsdp", "compat")`.
        top_package (`str`): The package; a room of it, to see what the room imports from itself.
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
            if top == top_package and not NAMES_OF_INIT.intersection(rest[:1]):
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


def order_of(room: Path) -> list[str]:
    """Return the modules of a room in an order in which they can be read; a circle among them is a `CycleError`."""
    modules = {path.stem: path.read_text() for path in room.glob("*.py") if path.stem != "__init__"}
    graph = {name: modules.keys() & find_imports(source, (room.name,), room.name) for name, source in modules.items()}
    return list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "room", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")), ids=lambda path: path.name
)
def test_no_room_goes_in_circles(room: Path) -> None:
    assert len(order_of(room)) == len([*room.glob("*.py")]) - 1


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "egg.py").write_text("from .hen import lay")
    (tmp_path / "hen.py").write_text("def lay():\n    from . import egg")
    with pytest.raises(CycleError):
        order_of(tmp_path)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("units", "from .cli import main", "not lower"),
        ("planning", "from hf_qlora_fsdp.config import QLoRAFSDPConfig", "plain arguments"),
        ("planning", "import hf_qlora_fsdp.loader", "not lower"),
        ("planning", "from hf_qlora_fsdp import loader", "not lower"),
        ("planning", "from . import units, loader", "not lower"),
        ("planning", "def plan():\n    from .loader import load", "not lower"),
        ("planning", "if TYPE_CHECKING:\n    from .loader import load", "not lower"),
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
        ("planning", "from .units import format_bytes"),
        ("cli", "from hf_qlora_fsdp import __version__"),
        ("loader", "import torch\nfrom torch.distributed import config"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert find_faults(module, source) == []

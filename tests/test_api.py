"""The public names: all there, and free until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_qlora_fsdp

# Seconds to import, each of them. `hf-qlora-fsdp --help` must not wait for them.
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets"}


def heavy_modules_after(statement: str) -> set[str]:
    """Return which of `HEAVY` a fresh interpreter has loaded after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return HEAVY.intersection(printed.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import hf_qlora_fsdp") == set()


def test_a_heavy_import_would_be_noticed() -> None:
    assert "torch" in heavy_modules_after("import hf_qlora_fsdp, torch")


@pytest.mark.parametrize("name", hf_qlora_fsdp.__all__)
def test_each_public_name_resolves(name: str) -> None:
    assert getattr(hf_qlora_fsdp, name).__name__ == name


def test_other_names_do_not_exist() -> None:
    assert not hasattr(hf_qlora_fsdp, "QLoRATrainer")

"""Triton's kernels without a GPU: in its interpreter, which Triton asks for when it is imported, so in a new process.

The interpreter cuts off what bfloat16 has no room for, where a GPU rounds, so other dtypes are compared there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_interpreted(module: str) -> str:
    """Call the function `interpret` of a test module and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import interpret; interpret()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

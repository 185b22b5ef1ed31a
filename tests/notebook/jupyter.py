"""A real Jupyter kernel to run cells in, and what they showed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]


@dataclass
class Shown:
    """What a cell showed.

    Args:
        text (`str`): What it printed.
        value (`str`): How its last expression was shown.
        error (`str`): Name of the exception that it raised.
        traceback (`str`): How that was shown.
    """

    text: str = ""
    value: str = ""
    error: str = ""
    traceback: str = ""
    images: list[str] = field(default_factory=list)


class Kernel:
    """A kernel of the notebook's own kind, in a folder of its own.

    Args:
        folder (`Path`): Its working directory.
        **environment (`str`): Variables for it.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.manager: Any = KernelManager(kernel_name="python3")
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "IPYTHONDIR": str(folder / ".ipython"), **environment}
        self.manager.start_kernel(cwd=str(folder), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, timeout: float = 120, while_running: Callable[[str], None] | None = None) -> Shown:
        """Run a cell to its end.

        Args:
            code (`str`): The cell.
            timeout (`float`): Seconds that it may take.
            while_running (`Callable`, *optional*): Called with what the cell has printed so far, each time it prints.
        """
        deadline, shown = time.monotonic() + timeout, Shown()
        asked = self.client.execute(code)
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                shown.text += content["text"]
                if while_running is not None:
                    while_running(shown.text)
            elif kind in ("execute_result", "display_data"):
                shown.value = content["data"].get("text/plain", "")
                shown.images += [data for name, data in content["data"].items() if name.startswith("image/")]
            elif kind == "error":
                shown.error, shown.traceback = content["ename"], "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                return shown

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()

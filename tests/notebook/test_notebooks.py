"""Training from a notebook: `notebook_launch` in a real kernel, and the notebooks that come with the package."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Machines with GPUs often have what the package needs, and no Jupyter. CI has all of the extra `dev`.
nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

from tests.notebook.jupyter import Kernel  # noqa: E402

ROOT = Path(__file__).parents[2]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def wait_until_dead(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -- notebook_launch ---------------------------------------------------------------------------------------------------

# What makes launchers that fork refuse, and something in the notebook that nobody can send.
IMPORTS = """
import os, time
from dataclasses import dataclass
import bitsandbytes, torch, trl
from trl import SFTConfig
from hf_qlora_fsdp import notebook_launch
stream = (number for number in range(3))
"""

# Refers to a class, a function and a constant of the notebook, and is called where nothing of it exists.
LAUNCH = """
OFFSET = 40
@dataclass
class Settings:
    rate: float
    def double(self):
        return 2 * self.rate
def shift(x):
    return x + OFFSET
def train(steps, settings):
    import torch.distributed as dist
    from tqdm import tqdm
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for _ in tqdm(range(steps), desc="Training", disable=rank != 0, mininterval=0):
        time.sleep(0.01)
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return {"total": total.item(), "shifted": shift(2), "rate": settings.double(), "pid": os.getpid()}
result = notebook_launch(train, 2, args=[3], kwargs={"settings": Settings(0.5)})
(result["total"], result["shifted"], result["rate"], result["pid"] != os.getpid())
"""

FAIL = """
def fail():
    if os.environ["RANK"] == "1":
        raise ValueError("there is no such thing")  # in the notebook
    time.sleep(300)
notebook_launch(fail, 2)
"""

SCRIPT = """
open("script.py", "w").write("import sys, os; result = [sys.argv[1:], os.environ['WORLD_SIZE'], os.environ['FLAG']]")
notebook_launch("script.py", 1, args=["--rate", 0.1], environment={"FLAG": "up"})
"""

# As in a notebook of a checkout that is not installed, whose first cell puts it on `sys.path`.
CHECKOUT = """
def look():
    import hf_qlora_fsdp
    return hf_qlora_fsdp.__file__, os.environ["PYTHONPATH"]
notebook_launch(look, 1, environment={"PYTHONPATH": ""})
"""

WAIT = """
import signal, sys
def end(*_):
    print("What I had is saved.", flush=True)
    sys.exit(75)
def wait():
    signal.signal(signal.SIGTERM, end)
    print(f"<{os.getpid()}>", flush=True)
    time.sleep(300)
notebook_launch(wait, 2)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(tmp_path_factory.mktemp("notebook")) as kernel:
        shown = kernel.run(IMPORTS)
        assert not shown.error, shown.traceback
        yield kernel


def test_a_function_of_the_notebook_runs_on_two_workers(kernel: Kernel) -> None:
    printed: list[str] = []
    shown = kernel.run(LAUNCH, while_running=printed.append)
    assert not shown.error, shown.traceback
    assert shown.value == "(3.0, 42, 1.0, True)"
    assert "Training: 100%" in shown.text
    assert any("Training: 100%" not in text and "Training:" in text for text in printed)  # live, not at the end


def test_a_traceback_of_a_worker_shows_in_the_cell(kernel: Kernel) -> None:
    shown = kernel.run(FAIL)
    assert shown.error == "WorkerError"
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.traceback)
    assert 'raise ValueError("there is no such thing")  # in the notebook' in plain  # the line itself
    assert "The above exception was the direct cause" in plain
    assert "Rank 1 of 2 failed, and all were ended: ValueError: there is no such thing" in plain
    assert "notebook/worker.py" not in plain


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("notebook_launch(lambda: next(stream), 2)", "cannot be sent to the workers"),
        ("notebook_launch('missing.py')", "neither a function nor a script"),
        ("notebook_launch('script.py', kwargs={'rate': 1})", "named arguments"),
        ("notebook_launch(print, 0)", "num_processes=0"),
    ],
)
def test_what_cannot_be_launched_is_refused(kernel: Kernel, code: str, message: str) -> None:
    kernel.run("open('script.py', 'w').close()")
    shown = kernel.run(code)
    assert shown.error == "ValueError" and message in shown.traceback


def test_a_script_gets_its_arguments(kernel: Kernel) -> None:
    assert kernel.run(SCRIPT).value == "[['--rate', '0.1'], '1', 'up']"


def test_a_script_may_end_with_sys_exit(kernel: Kernel) -> None:
    code = "open('script.py', 'w').write('import sys; sys.exit({})'); print(notebook_launch('script.py', 2))"
    shown = kernel.run(code.format(0))
    assert not shown.error and shown.text.endswith("None\n"), shown.traceback
    shown = kernel.run(code.format(3))
    assert shown.error == "WorkerError" and "SystemExit: 3" in shown.traceback


def test_workers_find_the_package_where_the_notebook_has_it(kernel: Kernel) -> None:
    # Its parent alone: with the package itself on the path, `import packing` would find ours.
    assert kernel.run(CHECKOUT).value == str((str(ROOT / "hf_qlora_fsdp" / "__init__.py"), str(ROOT)))


def test_an_interruption_ends_all_workers_and_the_kernel_goes_on(kernel: Kernel) -> None:
    pids: list[int] = []

    def interrupt(text: str) -> None:
        found = re.findall(r"<(\d+)>", text)
        if len(found) == 2 and not pids:
            pids.extend(map(int, found))
            kernel.manager.interrupt_kernel()

    shown = kernel.run(WAIT, while_running=interrupt)
    assert shown.error == "KeyboardInterrupt" and len(pids) == 2
    assert not any(map(is_alive, pids))
    assert shown.text.count("What I had is saved.") == 2  # what they say at their end is shown as well
    assert kernel.run("6 * 7").value == "42"


def test_the_end_of_the_kernel_ends_all_workers(tmp_path: Path) -> None:
    pids: list[int] = []
    with Kernel(tmp_path) as kernel:
        kernel.run("import os, time; from hf_qlora_fsdp import notebook_launch")

        def shut_down(text: str) -> None:
            pids[:] = map(int, re.findall(r"<(\d+)>", text))
            if len(pids) == 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            kernel.run(WAIT, while_running=shut_down)
        assert all(map(is_alive, pids))
    assert wait_until_dead(pids, 15)


# -- The notebooks -----------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_its_links_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            assert target.startswith("https://") or (path.parent / target).exists(), target


def execute(path: Path, folder: Path) -> list[str]:
    """Run a notebook from top to bottom; return what each of its code cells showed, as text."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [
        "".join(
            output.get("text") or output.get("evalue") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    for name, value in {
        "PYTHONPATH": os.pathsep.join(paths),
        "IPYTHONDIR": str(tmp_path / ".ipython"),
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_will_it_fit(tmp_path: Path) -> None:
    shown = "\n".join(execute(ROOT / "notebooks" / "1_will_it_fit.ipynb", tmp_path))
    assert "68.5B parameters in 4 bits" in shown and "It fits:" in shown
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"\d x 3090 +([\d,]+) tokens/s", shown)]
    assert len(rates) == 3 and rates == sorted(rates)
    assert re.search(r"fits: False\nlacks:\n  \S.*\nwould fit with:\n  \S", shown)
    needs = [float(size) for size in re.findall(r"tokens: ([\d.]+) GiB on each of 8 cards", shown)]
    assert len(needs) == 3 and needs == sorted(needs)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_fine_tuning_on_one_node(tmp_path: Path) -> None:
    shown = "\n".join(execute(ROOT / "notebooks" / "2_fine_tune_on_one_node.ipynb", tmp_path))
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", shown).groups())  # type: ignore[union-attr]
    assert last < first / 2
    assert "Healthy: 0 errors" in shown
    assert "Rank 1 of 2 failed, and all were ended: ValueError: process 1 has found no data" in shown
    assert "outputs/orders: nothing wrong was found" in shown
    assert json.loads(re.search(r"trained:  (.*)", shown)[1]).keys() == (  # type: ignore[index]
        json.loads(re.search(r"expected: (.*)", shown)[1]).keys()  # type: ignore[index]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_inside_the_sharding(tmp_path: Path) -> None:
    shown = "\n".join(execute(ROOT / "notebooks" / "3_inside_the_sharding.ipynb", tmp_path))
    assert "the same bits: True" in shown and "4.13 bits a weight" in shown
    assert "(16912, 1)     torch.bfloat16     16,912 of   33,824 bytes" in shown
    layers = ["#.....", ".#....", "..#...", "...#..", "....#.", ".....#"]
    assert "\n    ".join(["forward", *layers]) in shown and "\n    ".join(["backward", *layers[::-1]]) in shown
    compared = re.search(r"loss ([\d.]+) and ([\d.]+); of 84 gradients, the furthest differ by ([\d.]+)%", shown)
    assert compared and abs(float(compared[1]) - float(compared[2])) < 2**-8 * float(compared[1])
    assert 0 < float(compared[3]) < 5  # a gradient that lacks a rank, or is summed and not averaged, is 50 off or more


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_merging_and_using(tmp_path: Path) -> None:
    shown = "\n".join(execute(ROOT / "notebooks" / "4_merge_and_use.ipynb", tmp_path))
    assert "nothing wrong was found" in shown and '"bnb_4bit_quant_type": "nf4"' in shown
    trained, original = (
        float(re.search(rf"{name} +([\d.]+) nats", shown)[1])  # type: ignore[index]
        for name in ("trained", "original")
    )
    assert 0 < trained < original
    sizes = {name: float(size) for name, size in re.findall(r"(trained|original|4 bits) +(\d+) MiB", shown)}
    assert sizes["4 bits"] < sizes["trained"] / 2 == sizes["original"] / 2
    assert "To make good coffee, you need" in shown

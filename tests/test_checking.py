"""Each kind of damage is found, is the only thing that is found, and what is whole is left in peace."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qlora_fsdp import check_adapter
from hf_qlora_fsdp.cli import main
from tests.merging.test_merging import edit_config, edit_tensors, make_adapter
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parent.parent
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A checkpoint: adapter, optimizer states in the form of `export.save_optimizer`, manifest."""
    base = make_checkpoint(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("pristine") / "checkpoint-7"
    make_adapter(base, folder, modules_to_save=["norm"], use_dora=True)
    states, names = {}, []
    for stored, tensor in load_file(folder / WEIGHTS).items():
        name = parameter_name(stored)
        names.append(name)
        states |= {f"{name}::{key}": torch.ones_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
        states[f"{name}::step"] = torch.tensor(7.0)
    save_file(states, folder / "optimizer.safetensors")
    groups = [{"lr": 1e-3, "params": names}]
    (folder / "optimizer.json").write_text(json.dumps({"state": {}, "param_groups": groups}))
    return folder


def parameter_name(stored: str) -> str:
    """The name that a tensor of the file has in the `PeftModel`."""
    if "lora_magnitude_vector" in stored:
        return f"{stored}.default.weight"
    if "lora_" in stored:
        return stored.replace(".weight", ".default.weight")
    return stored.replace(".weight", ".modules_to_save.default.weight")


def write_manifest(folder: Path) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files, "facts": {}}))


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint-7"))


def test_a_whole_checkpoint_has_no_findings(checkpoint):
    write_manifest(checkpoint)
    report = check_adapter(checkpoint)
    assert report.ok and not report.findings
    seen = "\n".join(report.notes)
    for part in ("5 files are those of manifest.json", "tensors are finite", "have the shapes", "optimizer states are"):
        assert part in seen


def test_names_in_the_pristine_checkpoint_are_those_of_a_model(pristine):
    """The optimizer of a model would use exactly the names that the fixture made up."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((pristine / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), pristine, is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {parameter_name(stored) for stored in load_file(pristine / WEIGHTS)}


def cut(name: str, num_bytes: int = 1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-num_bytes])

    return damage


def set_values(name: str, value: float, rows: slice = slice(None)) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[name][rows].fill_(value))


def edit_optimizer(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "optimizer.safetensors")
        change(tensors)
        save_file(tensors, folder / "optimizer.safetensors")

    return damage


def of_another_run(folder: Path) -> None:
    described = json.loads((folder / "optimizer.json").read_text())
    described["param_groups"][0]["params"] = [
        name.replace("q_proj", "other_proj") for name in described["param_groups"][0]["params"]
    ]
    (folder / "optimizer.json").write_text(json.dumps(described))


# What is done to the checkpoint, and what has to be found; after "|", what may be found in consequence.
DAMAGE = {
    "adapter cut short": (cut(WEIGHTS), r"'adapter_model.safetensors' .* is cut short"),
    "config cut short": (cut("adapter_config.json", 5), r"adapter_config.json is no JSON|Expecting|delimiter"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "another rank": (
        edit_config(r=8),
        r"another rank than adapter_config.json.*r=8|ask for \[8, 128\]|ask for \[\d+, 8\]",
    ),
    "no tensors": (edit_tensors(dict.clear), "holds no tensors"),
    "B missing": (
        edit_tensors(lambda tensors: tensors.pop(f"{Q0}.lora_B.weight")),
        r"1 tensors \(\S+q_proj.lora_A.weight\) are one of two|one of the two matrices|knows other parameters",
    ),
    "A missing": (
        edit_tensors(lambda tensors: tensors.pop(f"{Q0}.lora_A.weight")),
        r"1 tensors \(\S+q_proj.lora_B.weight\) are one of two|one of the two matrices|knows other parameters",
    ),
    "untrained": (set_values(f"{Q0}.lora_B.weight", 0), r"1 tensors \(\S+q_proj.lora_B.weight\) are all zeros"),
    "one rank of eight": (
        set_values(f"{Q0}.lora_B.weight", 0, slice(16, None)),
        r"q_proj.lora_B.weight\) are zero in half",
    ),
    "NaN": (set_values(f"{Q0}.lora_A.weight", float("nan"), slice(1)), r"q_proj.lora_A.weight\) hold NaN"),
    "infinity": (
        set_values("base_model.model.model.norm.weight", float("inf")),
        r"model.norm.weight\) hold NaN or inf",
    ),
    "shape of another base": (
        edit_tensors(lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(4, 64)})),
        r"\[4, 64\].*\[4, 128\].*the base that the adapter was trained on|another shape than their parameter",
    ),
    "module of another base": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.model.conv.weight": torch.ones(4)})),
        "model.conv.weight.* no parameter of LlamaForCausalLM|knows other parameters",
    ),
    "optimizer cut short": (
        cut("optimizer.safetensors"),
        "'optimizer.safetensors' .* cut short|optimizer cannot be read",
    ),
    "optimizer of nothing": (lambda folder: (folder / "optimizer.json").unlink(), "optimizer cannot be read"),
    "optimizer of another run": (
        of_another_run,
        "knows other parameters than the adapter: it lacks .*q_proj.*other_proj",
    ),
    "optimizer lacks states": (
        edit_optimizer(
            lambda states: [states.pop(name) for name in list(states) if "0.self_attn.q_proj.lora_A" in name]
        ),
        r"1 parameters \(\S+layers.0.self_attn.q_proj.lora_A.weight\) have no state",
    ),
    "optimizer in pieces": (
        edit_optimizer(lambda states: states.update({f"{Q0}.lora_B.default.weight::exp_avg": torch.ones(64, 4)})),
        r"1 optimizer states .*lora_B.default.weight::exp_avg\) have another shape",
    ),
    "optimizer with NaN": (
        edit_optimizer(lambda states: states[f"{Q0}.lora_B.default.weight::exp_avg"].fill_(float("nan"))),
        r"1 optimizer states .*exp_avg\) have NaN",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(case, checkpoint, capsys):
    damage, pattern = DAMAGE[case]
    damage(checkpoint)
    report = check_adapter(checkpoint)
    expected, *_ = pattern.split("|")
    assert any(re.search(expected, finding) for finding in report.findings)
    strange = [finding for finding in report.findings if not re.search(pattern, finding)]
    assert not strange
    assert main(["check", str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert all(finding in printed for finding in report.findings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("README.md"), r"README.md has [\d,]+ bytes, manifest.json says"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is in manifest.json but not in the folder"),
        (set_values(f"{Q0}.lora_A.weight", 1.0), "adapter_model.safetensors has been altered.*SHA-256"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'), "manifest.json cannot be read"),
    ],
)
def test_files_that_are_not_those_of_the_manifest(damage, message, checkpoint):
    (checkpoint / "README.md").write_text("An adapter.")
    write_manifest(checkpoint)
    assert check_adapter(checkpoint).ok
    damage(checkpoint)
    (finding,) = check_adapter(checkpoint).findings
    assert re.search(message, finding)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_opened(checkpoint, tmp_path):
    victim = tmp_path / "executed"
    payload = pickle.dumps(Malice(victim))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "adapter_model.bin"):
        (checkpoint / name).write_bytes(payload)
    report = check_adapter(checkpoint)
    assert report.ok
    assert "not opened" in "\n".join(report.notes) and "rng_state_0.pth" in "\n".join(report.notes)
    (checkpoint / WEIGHTS).unlink()
    (finding,) = check_adapter(checkpoint).findings
    assert "pickle can run code" in finding
    assert not victim.exists()
    pickle.loads(payload).close()
    assert victim.exists()  # had it been opened, this is what had happened


def test_base_that_is_not_here_is_said_to_be_missing(checkpoint):
    edit_config(base_model_name_or_path="org/not-in-the-cache")(checkpoint)
    report = check_adapter(checkpoint)
    assert report.ok
    assert any("not compared with the base model 'org/not-in-the-cache'" in note for note in report.notes)


def test_folder_of_a_run_names_its_checkpoints(checkpoint):
    (finding,) = check_adapter(checkpoint.parent).findings
    assert "checkpoint-7" in finding
    (finding,) = check_adapter(checkpoint / "nowhere").findings
    assert "There is no folder" in finding


def test_exit_codes_of_the_command(checkpoint):
    command = [sys.executable, "-m", "hf_qlora_fsdp.cli", "check", str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing wrong was found" in done.stdout

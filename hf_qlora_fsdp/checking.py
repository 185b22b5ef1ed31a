"""Looking into an adapter or a checkpoint before a night of compute is spent on it.

Broken adapters load without an error: PEFT fills in what a file lacks with fresh initial values and says nothing. So
each kind of damage that has been seen in the wild is looked for here:

* files cut short or altered (against `manifest.json`, where there is one, and by their own headers);
* adapters without tensors, or with one of two matrices missing;
* a matrix of zeros, which was never trained or not saved, and half of its rows zero, which is one rank's shard;
* NaN and infinity;
* shapes that contradict `adapter_config.json` or the base model's config, where that can be found without a network;
* optimizer states of other parameters than those in the adapter.

Tensors are read one at a time. No pickle is ever opened: a `.bin`, `.pt` or `.pth` file can run code.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from .anatomy import build_meta_model
from .export import OPTIMIZER_TENSORS, OPTIMIZER_VALUES
from .files import hash_files
from .loading.weights import Weights
from .merging.edits import ADAPTER_CONFIG, Adapter, refuse_unmergeable

MANIFEST = "manifest.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_ADAPTER_NAME = re.compile(
    r"(?P<before>\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta))"
    r"\.[^.]+(?P<after>\.weight|\.bias|$)"
)
_COPY_NAME = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_SHOWN = 3


@dataclass
class Report:
    """What was found.

    Args:
        folder (`str`): The folder that was looked into.
        findings (`list[str]`): What is wrong, each with what to do.
        notes (`list[str]`): What was seen to be right, and what could not be looked at.
    """

    folder: str
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        lines = [*(f"  ok     {note}" for note in self.notes), *(f"  WRONG  {finding}" for finding in self.findings)]
        verdict = "nothing wrong was found" if self.ok else f"{len(self.findings)} findings"
        return "\n".join([f"{self.folder}: {verdict}", *lines])


def check_adapter(folder: str | os.PathLike[str]) -> Report:
    """Check an adapter or a training checkpoint.

    Args:
        folder (`str`): Folder with `adapter_config.json` and `adapter_model.safetensors`, and with `manifest.json`,
            `optimizer.safetensors` and `optimizer.json` in a checkpoint.
    Returns:
        `Report`: What is wrong, if anything. Damage is reported, never raised.
    """
    report, path = Report(str(folder)), Path(folder)
    if not path.is_dir():
        report.findings.append(f"There is no folder {str(folder)!r}. Name the folder of an adapter or checkpoint.")
        return report
    _check_manifest(path, report)
    _check_files(path, report)
    adapter = _open_adapter(path, report)
    if adapter is not None:
        _check_tensors(adapter, report)
        _check_base(adapter, report)
        if (path / OPTIMIZER_TENSORS).exists() or (path / OPTIMIZER_VALUES).exists():
            _check_optimizer(path, adapter, report)
    return report


def _check_manifest(path: Path, report: Report) -> None:
    if not (path / MANIFEST).is_file():
        return
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.findings.append(
            f"{MANIFEST} cannot be read ({error!r}): the checkpoint was never finished. Use another."
        )
        return
    num_findings = len(report.findings)
    for name, (num_bytes, digest) in expected.items():
        file = path / name
        if not file.is_file():
            report.findings.append(f"{name} is in {MANIFEST} but not in the folder. Copy the checkpoint again.")
        elif file.stat().st_size != num_bytes:
            report.findings.append(
                f"{name} has {file.stat().st_size:,} bytes, {MANIFEST} says {num_bytes:,}. Copy the checkpoint again."
            )
        elif hash_files(file) != digest:
            report.findings.append(
                f"{name} has been altered since it was saved: its SHA-256 is not that of {MANIFEST}."
            )
    if len(report.findings) == num_findings:
        report.notes.append(f"{len(expected)} files are those of {MANIFEST}")


def _check_files(path: Path, report: Report) -> None:
    """Check that every safetensors and JSON file can be read, and name the files that are not opened."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            Weights([str(file)])
        except ValueError as error:
            report.findings.append(str(error))
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            report.findings.append(f"{file.name} is no JSON ({error}): it is cut short or damaged. Copy it again.")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        report.notes.append(f"not opened, since a pickle can run code: {', '.join(pickles)}")


def _open_adapter(path: Path, report: Report) -> Adapter | None:
    try:
        return Adapter(str(path))
    except (ValueError, TypeError, OSError) as error:
        if str(error) not in report.findings:  # a file that is cut short has been reported already
            report.findings.append(str(error) or repr(error))
        return None


def _check_tensors(adapter: Adapter, report: Report) -> None:
    names = set(adapter.weights.tensors)
    num_findings, zero, shards, not_finite, alone = len(report.findings), [], [], [], []
    for name in sorted(names):
        for first, second in (*_PAIRS, *(pair[::-1] for pair in _PAIRS)):
            part, partner = f".{first}", f".{second}"
            if f"{part}." in f"{name}." and not name.endswith(".bias") and name.replace(part, partner) not in names:
                alone.append(name)
        tensor = adapter.read(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            not_finite.append(name)
        if any(f".{part}." in f"{name}." for pair in _PAIRS for part in pair) and tensor.ndim == 2:
            filled = tensor.ne(0).any(dim=1)
            if not filled.any():
                zero.append(name)
            elif ".lora_B." in name and filled.sum() <= len(filled) / 2:
                shards.append(name)
    for found, what in (
        (alone, "are one of two matrices, and the other is missing. The file is incomplete; use another checkpoint."),
        (not_finite, "hold NaN or infinity. The run diverged; use an earlier checkpoint and a lower learning rate."),
        (
            zero,
            "are all zeros, so their layers do what the base does: untrained, or not saved. Use another checkpoint.",
        ),
        (
            shards,
            "are zero in half their rows or more, as when one rank's shard is saved for the whole. Save it again.",
        ),
    ):
        if found:
            report.findings.append(f"{len(found)} tensors ({_some(found)}) {what}")
    report.findings += _check_ranks(adapter)
    if len(report.findings) == num_findings:
        report.notes.append(f"{len(names)} tensors are finite, complete and not zero")


def _check_ranks(adapter: Adapter) -> list[str]:
    wrong = []
    targets = adapter.config.target_parameters or ()
    for name, stored in adapter.weights.tensors.items():
        match = re.match(
            r"^base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_embedding_A|lora_B\.weight)$", name
        )
        if match and len(stored.shape) == 2:
            module = match["module"].replace(".base_layer", "")
            leaves = [leaf for path, _, leaf in (target.rpartition(".") for target in targets) if module.endswith(path)]
            r, _ = adapter.scaling(match["module"])
            found = stored.shape[1 if match["part"].startswith("lora_B") else 0]
            # Factors of experts lie side by side, as many as there are; which parameter's they are, the model knows.
            if all(found % adapter.scaling(f"{module}.{leaf}")[0] for leaf in leaves) if leaves else found != r:
                wrong.append(f"{name} {list(stored.shape)}, r={r}")
    if not wrong:
        return []
    return [
        f"{len(wrong)} tensors have another rank than {ADAPTER_CONFIG} says ({_some(wrong)}). Config and weights do "
        "not belong together; take both from one run."
    ]


def _check_base(adapter: Adapter, report: Report) -> None:
    """Compare shapes with those of the base model, if its config is on this machine."""
    name = adapter.config.base_model_name_or_path
    try:
        refuse_unmergeable(adapter.config, adapter.source)
        config = AutoConfig.from_pretrained(name, revision=adapter.config.revision, local_files_only=True)
        model = build_meta_model(config, torch.bfloat16)
    except (
        Exception
    ) as error:  # no such folder, not in the cache, remote code, an unknown architecture: all the same here
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else repr(error)
        report.notes.append(f"not compared with the base model {name!r}: {reason}")
        return
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        edits = adapter.plan_edits(model, shapes.__getitem__)
    except ValueError as error:
        report.findings.append(str(error))
    else:
        report.notes.append(f"{len(edits)} parameters of {name!r} have the shapes that the adapter asks for")


def _check_optimizer(path: Path, adapter: Adapter, report: Report) -> None:
    try:
        described = json.loads((path / OPTIMIZER_VALUES).read_text())
        trained = {_adapter_name(name): name for group in described["param_groups"] for name in group["params"]}
        with safe_open(path / OPTIMIZER_TENSORS, framework="pt") as handle:
            states = {name: list(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            not_finite = [name for name in states if not handle.get_tensor(name).isfinite().all()]
    except Exception as error:  # missing, cut short, no JSON, another form: one finding, in its own words
        report.findings.append(
            f"The optimizer cannot be read ({error!r}), so the run cannot be resumed from here. Use another."
        )
        return
    num_findings, stored = len(report.findings), set(adapter.trained_names())
    lacking, foreign = sorted(stored - set(trained)), sorted(set(trained) - stored)
    if lacking or foreign:
        report.findings.append(
            f"The optimizer knows other parameters than the adapter: it lacks {_some(lacking) or 'none'} and has "
            f"{_some(foreign) or 'none'} besides. Optimizer and adapter are of different runs; use another checkpoint."
        )
    with_state = {_adapter_name(name.rpartition("::")[0]) for name in [*states, *described.get("state", {})]}
    bare = sorted(set(trained) & stored - with_state) if with_state else []
    if bare:
        report.findings.append(
            f"{len(bare)} parameters ({_some(bare)}) have no state in {OPTIMIZER_TENSORS}. Resumed, they would start "
            "anew."
        )
    bent = [
        name
        for name, shape in states.items()
        if shape
        and (of := adapter.weights.tensors.get(_adapter_name(name.rpartition("::")[0])))
        and list(of.shape) != shape
    ]
    for found, what in ((bent, "another shape than their parameter"), (not_finite, "NaN or infinity")):
        if found:
            report.findings.append(
                f"{len(found)} optimizer states ({_some(found)}) have {what}. Use another checkpoint."
            )
    if len(report.findings) == num_findings:
        report.notes.append(f"{len(states)} optimizer states are those of the adapter's tensors")


def _adapter_name(parameter: str) -> str:
    """Return the name under which PEFT stores a parameter: that without the name of the adapter."""
    name = _COPY_NAME.sub("", parameter)
    return _ADAPTER_NAME.sub(lambda match: match["before"] + match["after"], name).removesuffix(
        ".weight" if ".lora_magnitude_vector" in name else "\n"
    )


def _some(names: list[Any]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

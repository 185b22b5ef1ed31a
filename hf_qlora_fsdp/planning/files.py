"""A plan as files that run: a script, or a YAML file for `hf-qlora-fsdp train --config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from .planner import Plan
from .settings import Settings

DEFAULT_DATASET = "trl-lib/Capybara"
_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_SCRIPT = '''"""Fine-tune {model} as planned: {summary}.

    torchrun --nproc_per_node {gpus_per_host} {file}
"""

from datasets import load_dataset
from peft import LoraConfig

from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

trainer = QLoRAFSDPTrainer(
    model={model!r},
    args=QLoRAFSDPConfig(
        output_dir={output_dir!r},
{arguments}
    ),
    train_dataset={dataset},
    peft_config=LoraConfig(
        r={lora_r},
        lora_alpha={lora_alpha},
        target_modules={target_modules!r},
        task_type="CAUSAL_LM",
    ),
)
trainer.train()
trainer.save_model()
'''


def check_emit(file: str | None) -> None:
    """Refuse a file of a kind that is not written.

    Raises:
        ValueError: It is neither a script nor YAML.
    """
    if file is not None and Path(file).suffix not in (".py", ".yaml", ".yml"):
        raise ValueError(
            f"--emit {file}: from its name it is neither a script nor YAML. Name it script.py, or config.yaml."
        )


def training_fields(settings: Settings) -> dict[str, Any]:
    """Return settings as fields of `QLoRAFSDPConfig`, without what is its default.

    Args:
        settings (`Settings`): The settings.
    """
    values: dict[str, Any] = {
        "max_length": settings.seq,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
    }
    optional = {
        "gradient_checkpointing": (settings.gradient_checkpointing, True),
        "checkpoint_layers": (settings.checkpoint_layers, None),
        "activation_offloading": (settings.activation_offloading, False),
        "cpu_offload": (settings.cpu_offload, False),
        "cpu_offload_layers": (settings.cpu_offload_layers, None),
        "replicate_layers": (settings.replicate_layers, None),
        "cpu_offload_pin_memory": (settings.cpu_offload_pin_memory, True),
        "fuse_lora": (settings.fuse_lora, True),
        "use_liger_kernel": (settings.use_liger_kernel, False),
    }
    return values | {name: value for name, (value, default) in optional.items() if value != default}


def emit(plan: Plan, file: str, summary: str, dataset: str = DEFAULT_DATASET) -> None:
    """Write a plan as a script or as YAML, by the name of the file.

    Args:
        plan (`Plan`): The plan.
        file (`str`): `.py`, `.yaml` or `.yml`.
        summary (`str`): What it does, in words.
        dataset (`str`): Hub id of a dataset, or a JSON, CSV or Parquet file.
    """
    check_emit(file)
    write = _write_script if file.endswith(".py") else _write_yaml
    Path(file).write_text(write(plan, Path(file).name, summary, dataset))


def _write_script(plan: Plan, file: str, summary: str, dataset: str) -> str:
    fields = training_fields(plan.chosen.settings) | _dtype_field(plan)
    kind = _SUFFIXES.get(Path(dataset).suffix)
    source = f'load_dataset("{kind}", data_files={dataset!r}, split="train")' if kind else None
    return _SCRIPT.format(
        model=_model_name(plan.model),
        summary=summary,
        file=file,
        gpus_per_host=plan.machine.gpus_per_host,
        output_dir=_output_dir(plan.model),
        arguments="\n".join(f"        {name}={value!r}," for name, value in fields.items()),
        dataset=source or f'load_dataset({dataset!r}, split="train")',
        lora_r=plan.lora_r,
        lora_alpha=2 * plan.lora_r,
        target_modules=plan.target_modules,
    )


def _write_yaml(plan: Plan, file: str, summary: str, dataset: str) -> str:
    values = {
        "model_name_or_path": _model_name(plan.model),
        "dataset_name": dataset,
        "output_dir": _output_dir(plan.model),
        "use_peft": True,
        "lora_r": plan.lora_r,
        "lora_alpha": 2 * plan.lora_r,
        "lora_target_modules": plan.target_modules,
    }
    values |= training_fields(plan.chosen.settings) | _dtype_field(plan)
    head = f"# {summary}.\n# hf-qlora-fsdp train --config {file}\n"
    return head + yaml.safe_dump(values, sort_keys=False)


def _dtype_field(plan: Plan) -> dict[str, str]:
    dtype = str(plan.weight.param_dtype).removeprefix("torch.")
    return {} if dtype == "bfloat16" else {"param_dtype": dtype}


def _model_name(model: str) -> str:
    """Return what a trainer takes for a model: the folder of a `config.json`."""
    return str(Path(model).parent) if model.endswith("config.json") else model


def _output_dir(model: str) -> str:
    name = _model_name(model)
    return f"{Path(os.path.abspath(name)).name}-SFT"  # which has a name where `.` has none

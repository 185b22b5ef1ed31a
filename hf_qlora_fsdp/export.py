"""Saving what was trained, and reading it back.

Only trainable tensors are gathered, one after the other: a 70B base stays where it is while a 0.8 GB adapter is
written. The files are PEFT's own (`adapter_model.safetensors`, `adapter_config.json`), with PEFT's names, so plain
`PeftModel.from_pretrained` loads them on any machine.

Wrappers put their names into those of the parameters (`_checkpoint_wrapped_module` and the like). PEFT then finds no
tensor of its own and writes an empty file without an error. Here the names are stripped, the tensors written are
counted against the tensors trained, and an adapter that lacks one is not written.

Beside each adapter lies `base_quantization.json`, which says how the base was quantised (`quantization.py`).

The optimizer's states are saved likewise: whole tensors under the names of their parameters, in one safetensors file,
which any number of ranks can read back and cut for itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import EmptyAdapterError
from .packed_linear import PackedLinear4bit
from .quantization import write_quantization
from .ranks import fail_together, rank
from .sharding import base_model, shard_again
from .units import format_dtype

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_VALUES = "optimizer.json"

_WRAPPER_NAMES = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def canonical_name(name: str) -> str:
    """Strip what wrappers add to the name of a parameter."""
    return _WRAPPER_NAMES.sub("", name)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by their canonical names, as shards, in full precision, whatever ran before."""
    shard_again(model)
    return {canonical_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def check_exportable(model: PeftModel) -> dict[str, nn.Parameter]:
    """Check that PEFT would write every tensor that is trained. Costs little: only names are asked for.

    Returns:
        `dict[str, nn.Parameter]`: The trainable parameters by their canonical names, found in the one walk through the
        model that is needed.
    Raises:
        EmptyAdapterError: Nothing is trainable, or some trainable tensor would be missing from the files.
    """
    trained = trainable_parameters(model)
    if not trained:
        raise EmptyAdapterError(
            f"No parameter of the {type(model).__name__} is trainable, so its adapter would be empty. Was the adapter "
            "frozen or merged? Pass is_trainable=True to PeftModel.from_pretrained."
        )
    whole = [name for name, parameter in trained.items() if not isinstance(parameter, DTensor)]
    if whole and dist.is_initialized() and dist.get_world_size() > 1:
        raise EmptyAdapterError(
            f"{len(whole)} trained tensors, such as {whole[0]!r}, are whole on every rank, so nobody reduces their "
            "gradients and every rank trains an adapter of its own. Give peft_config to load_quantized_model instead "
            "of calling get_peft_model afterwards."
        )
    written = sum(len(_stored_names(model, trained, name)) for name in trained_adapters(model, trained))
    if written != len(trained):
        raise EmptyAdapterError(
            f"{len(trained)} tensors are trained, but PEFT would write {written} of them: it does not recognise names "
            f"such as {next(name for name, p in model.named_parameters() if p.requires_grad)!r}. Remove the wrapper "
            "that renames the modules; gradient_checkpointing=True needs none."
        )
    return trained


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Write the trained adapters of a sharded `PeftModel` as plain PEFT files. A collective; rank 0 writes.

    Args:
        model (`PeftModel`): The model, sharded or not.
        folder (`str`): Where to write; the adapter `"default"` at the top, others in folders of their own.
    Raises:
        EmptyAdapterError: Nothing is trainable, or a trained tensor would be missing from the files.
    """
    trained = check_exportable(model)
    adapters = trained_adapters(model, trained)
    state = dict(_gather(trained.items()))
    with fail_together(f"saving the adapter to {folder}"):
        if rank() == 0:
            type(model).save_pretrained(  # not the instance's, which the trainer binds to this function
                model,
                str(folder),
                state_dict=state,
                selected_adapters=adapters,
                save_embedding_layers=False,
            )
            quantization = describe_quantization(model)
            for name in adapters if quantization else ():
                write_quantization(_adapter_folder(folder, name), quantization)


def describe_quantization(model: PeftModel) -> dict[str, Any]:
    """Return how the base of a model is quantised, by the names in `quantization.FIELDS`.

    Its layers are asked, not its config: in a model that a script has loaded, the config's dtype is not the one that
    matrices are multiplied in. A model without packed layers gives an empty dict.
    """
    base: Any = base_model(model)
    layers = [module for module in base.modules() if isinstance(module, PackedLinear4bit)]
    if not layers:
        return {}
    kinds = {(layer.layout.quant_type, layer.layout.double_quant, layer.compute_dtype) for layer in layers}
    assert len(kinds) == 1, f"layers are quantised in several ways: {kinds}"
    ((quant_type, double_quant, compute_dtype),) = kinds
    return {
        "quant_type": quant_type,
        "double_quant": double_quant,
        "compute_dtype": format_dtype(compute_dtype),
        "skip_modules": sorted(set(base.hf_quantizer.modules_to_not_convert)),
    }


def _adapter_folder(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def load_adapters(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Read back all that `save_adapter` has written: `"default"` from the top, others from folders of their own."""
    for name in trained_adapters(model):
        load_adapter(model, _adapter_folder(folder, name), name)


def load_adapter(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Read an adapter into a sharded `PeftModel` that has the same one. Every rank cuts its own part.

    Args:
        model (`PeftModel`): The model.
        folder (`str`): Folder with `adapter_model.safetensors`.
        adapter_name (`str`): Which adapter of the model to fill.
    Raises:
        ValueError: The file and the model do not have the same trainable tensors.
    """
    with fail_together(f"reading the adapter in {folder}"):
        if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}, so there is no adapter to continue from. Pass "
                "the folder of a checkpoint that this trainer or PEFT has written."
            )
        stored = load_peft_weights(str(folder), device="cpu")
        targets = _stored_names(model, trainable_parameters(model), adapter_name)
        if set(stored) != set(targets):
            lacking, foreign = sorted(set(targets) - set(stored)), sorted(set(stored) - set(targets))
            raise ValueError(
                f"The adapter in {str(folder)!r} is not the one that the model trains: it lacks {lacking[:3]} and has "
                f"{foreign[:3]} besides ({len(lacking)} and {len(foreign)} tensors). Pass the peft_config it was "
                "trained with."
            )
        for name, parameter in targets.items():
            if stored[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {list(stored[name].shape)} in {str(folder)!r} and {list(parameter.shape)} in "
                    "the model. Pass the peft_config the adapter was trained with (r, target_modules)."
                )
        for name, parameter in targets.items():
            _fill(parameter, stored[name])


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str]) -> None:
    """Write the optimizer's states, whole and by name. A collective; rank 0 writes."""
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            full_name = f"{names[id(parameter)]}::{key}"
            (tensors if isinstance(value, torch.Tensor) else values)[full_name] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    gathered = dict(_gather(tensors.items()))
    with fail_together(f"saving the optimizer to {folder}"):
        if rank() == 0:
            save_file(gathered, Path(folder) / OPTIMIZER_TENSORS)
            described = json.dumps({"state": values, "param_groups": groups}, indent=1)
            (Path(folder) / OPTIMIZER_VALUES).write_text(described)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str]) -> None:
    """Read the optimizer's states back, for any number of ranks.

    Raises:
        ValueError: The states belong to other parameters.
    """
    parameters = trainable_parameters(model)
    with fail_together(f"reading the optimizer in {folder}"):
        described = json.loads((Path(folder) / OPTIMIZER_VALUES).read_text())
        stored_names = {name for group in described["param_groups"] for name in group["params"]}
        if stored_names != set(parameters):
            raise ValueError(
                f"The optimizer in {str(folder)!r} has states for {len(stored_names)} tensors, of which "
                f"{len(stored_names & set(parameters))} are among the {len(parameters)} trained now. Resume with the "
                "peft_config of the checkpoint."
            )
        for group, stored in zip(optimizer.param_groups, described["param_groups"], strict=True):
            group.update({key: _like(group.get(key), value) for key, value in stored.items() if key != "params"})
        # Fused optimizers count their steps on the device, as `torch.optim.Optimizer.load_state_dict` knows.
        fused = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
        on_device = {id(parameter) for group in fused for parameter in group["params"]}
        for full_name, value in described["state"].items():
            name, _, key = full_name.rpartition("::")
            optimizer.state[parameters[name]][key] = value
        with safe_open(Path(folder) / OPTIMIZER_TENSORS, framework="pt") as handle:
            for full_name in handle.keys():  # noqa: SIM118, a handle is no mapping
                name, _, key = full_name.rpartition("::")
                value = _cut_like(handle.get_tensor(full_name), parameters[name])
                if id(parameters[name]) in on_device:
                    value = value.to(parameters[name].device)
                optimizer.state[parameters[name]][key] = value


def _gather(tensors: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        whole = tensor.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if rank() == 0:
            yield name, whole.cpu().contiguous().clone()


def _fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        cut = _cut_like(value.to(parameter.dtype), parameter)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(cut.to_local() if isinstance(cut, DTensor) else cut)


def _cut_like(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Cut a whole tensor as the parameter is cut. Scalars (an optimizer's step count) stay whole, on the host."""
    if value.ndim == 0:
        return value
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    device = parameter.to_local().device
    # src_data_rank=None: every rank has read the whole tensor, so nothing need be sent.
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def trained_adapters(model: PeftModel, trained: dict[str, nn.Parameter] | None = None) -> list[str]:
    """Return the names of the adapters that have trainable parameters: these, where they have been found already."""
    parts = {part for name in trained or trainable_parameters(model) for part in name.split(".")}
    return [name for name in model.peft_config if name in parts]


def _stored_names(model: PeftModel, trained: dict[str, nn.Parameter], adapter_name: str) -> dict[str, nn.Parameter]:
    """Return those of the trainable parameters that belong to an adapter, by the names that PEFT stores them under."""
    # PEFT maps names by walking a state dict; tensors that carry their own name tell where each one went.
    tags = {name: torch.tensor(index) for index, name in enumerate(trained)}
    by_tag = list(trained.values())
    stored = get_peft_model_state_dict(model, state_dict=tags, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: by_tag[int(tag)] for name, tag in stored.items()}


def _like(current: Any, value: Any) -> Any:
    """Give a JSON value the type that the optimizer has for it: tuples come back as lists."""
    return tuple(value) if isinstance(current, tuple) else value


def synchronize() -> None:
    """Wait until rank 0 has written what the others will read."""
    if dist.is_initialized():
        dist.barrier()

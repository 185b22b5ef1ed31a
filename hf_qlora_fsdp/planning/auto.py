"""`auto_plan=True`: a run that plans itself, before anything is loaded.

What `hf-qlora-fsdp plan` does for a machine that somebody describes is done here for the one that the run is on: the
least memory that any rank finds on its card and its host. What the script has said stays as it is, which is told by its
not being the default; the number of sequences in a step stays in any case, so that what is learned is the same.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ..errors import DoesNotFitError
from ..host import free_memory_bytes
from ..loading.adapters import default_peft_config
from ..ranks import local_world_size, log_once, rank, world_size
from ..units import format_dtype
from .cards import CONTEXT_BYTES, find_card
from .planner import Plan, plan
from .report import describe

_PLANNED = (
    "gradient_checkpointing",
    "checkpoint_layers",
    "activation_offloading",
    "cpu_offload",
    "cpu_offload_pin_memory",
    "cpu_offload_layers",
    "replicate_layers",
)
_NOT_COUNTED = {
    "reshard_after_forward": (False, "a plan counts layers as freed after their forward, and all of them would stay"),
    "cpu_offload_trainable": (True, "a plan counts what is trained on the card, and it would lie on the host"),
}
"""Options that change what a run takes in a way that no plan knows, each with the value that does."""


def apply_plan(args: Any, model: Any, peft_config: Any = None, quantization: Any = None) -> None:
    """Set the arguments of a run to what is fastest and fits, and print what was chosen. A collective.

    Args:
        args (`QLoRAFSDPConfig`): The arguments, which are changed.
        model (`str`): Hub id or folder of the model.
        peft_config (`LoraConfig`, *optional*): What is trained.
        quantization (`BitsAndBytesConfig`, *optional*): 4-bit type, in place of the fields of `args`.
    Raises:
        DoesNotFitError: Nothing fits. Says what would help.
        ValueError: Sequences may have any length, or an option is set that no plan counts.
    """
    if not isinstance(model, str):
        log_once("auto_plan=True has no effect: the model is in memory already. Pass its name or folder instead.")
        return
    if args.max_length is None:
        raise ValueError(
            "auto_plan=True with max_length=None: sequences may have any length, so what they take cannot be planned. "
            "Write max_length."
        )
    for name, (value, why) in _NOT_COUNTED.items():
        if getattr(args, name) == value:
            raise ValueError(f"auto_plan=True with {name}={value}: {why}. Leave one of the two out.")
    found = make_plan(args, model, peft_config, quantization)
    if rank() == 0:
        print(f"auto_plan\n{describe(found)}", flush=True)
    if not found.fits:
        changes = "; or ".join(change.text for change in found.changes) or "a smaller model"
        raise DoesNotFitError(
            f"auto_plan=True found no settings with which {model!r} fits: {'; '.join(found.chosen.obstacles)}.",
            f"What would help: {changes}.",
        )
    settings = found.chosen.settings
    for name in _PLANNED:
        if not (name == "checkpoint_layers" and args.checkpoint_layers == "auto"):
            setattr(args, name, getattr(settings, name))
    args.per_device_train_batch_size = settings.batch
    args.gradient_accumulation_steps = settings.gradient_accumulation_steps


def make_plan(args: Any, model: str, peft_config: Any, quantization: Any) -> Plan:
    """Plan a run on this machine. A collective."""
    on_gpu = not args.use_cpu
    device_bytes, host_bytes = find_memory(on_gpu)
    explicit = not _is_default(args, "per_device_train_batch_size")
    return plan(
        model,
        num_gpus=world_size(),
        gpus_per_host=local_world_size(),
        device_memory=device_bytes,
        host_memory=host_bytes,
        card=_name_card() if on_gpu else None,
        seq=args.max_length,
        batch=args.per_device_train_batch_size if explicit else None,
        target_batch=world_size() * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        peft_config=peft_config or default_peft_config(),
        use_liger_kernel=args.use_liger_kernel,
        fuse_lora=args.fuse_lora,
        param_dtype=format_dtype(args.compute_dtype),
        quantization_config=quantization or args.quantization_config(),
        trust_remote_code=args.trust_remote_code,
        fixed=find_fixed(args, on_gpu),
        **args.hub_options(),
    )


def find_fixed(args: Any, on_gpu: bool) -> dict[str, Any]:
    """Return what the script has said about memory, and so is not to be changed.

    Args:
        args (`QLoRAFSDPConfig`): The arguments.
        on_gpu (`bool`): Whether the run is on cards. Without, there is no other place to put anything.
    """
    fixed = {name: getattr(args, name) for name in _PLANNED if not _is_default(args, name)}
    if fixed.get("checkpoint_layers") == "auto":  # which measures, and is right whatever is planned
        fixed["checkpoint_layers"] = None
    if args.cpu_offload_dir is not None:
        fixed["mapped"] = True
    return fixed if on_gpu else {"activation_offloading": False, "cpu_offload": False} | fixed


def find_memory(on_gpu: bool) -> tuple[int, int | None]:
    """Return what every card has for this run, and every host, in bytes. A collective."""
    # What the ranks hold already is theirs.
    host = free_memory_bytes(with_swap=False) + local_world_size() * psutil.Process().memory_info().rss
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        allowed = round(torch.cuda.get_per_process_memory_fraction() * total)
        device = min(allowed, free + torch.cuda.memory_reserved() + CONTEXT_BYTES)
    else:
        device = host // local_world_size()
    everybody: list[Any] = [None] * world_size()
    dist.all_gather_object(everybody, (device, host))
    device, host = (min(values) for values in zip(*everybody, strict=True))
    return device, host if on_gpu else None


def _is_default(args: Any, name: str) -> bool:
    return getattr(args, name) == next(item.default for item in fields(args) if item.name == name)


def _name_card() -> str | None:
    name = torch.cuda.get_device_name()
    try:
        return find_card(name).name
    except ValueError:
        log_once("auto_plan: %s is not among the cards whose speed is known; that of a similar one is taken.", name)
        return None

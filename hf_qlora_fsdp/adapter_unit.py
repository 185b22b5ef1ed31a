"""The adapters of all layers as one FSDP unit, gathered once a step.

With its layer, an adapter is gathered twice a step, and its gradients are reduced by themselves. Of the 23 parameters
of a Llama layer 14 are LoRA's, and two hundredths of its bytes; but what FSDP does in Python it does for each
parameter, and where few tokens are computed with at a time, a card waits for Python. As one unit they are gathered as
the forward begins, stay until the backward's end, and have their gradients reduced at once: the same sums, so the same
bits.

**What it takes of a card** between forward and backward is all adapters in the parameter dtype, and their gradients,
until they are reduced in float32: for an 8B model with LoRA of rank 16 on all linear layers 84 MB each, and 168 MB.

**A module of its own.** FSDP gathers a unit when its module is called, and nobody calls LoRA's inside a fused layer
(`speed/fusion.py`). So the unit is an empty module beside the model, in which FSDP was shown the layers' modules once.
These keep their places and names, and checkpoints know nothing of it. It is told to gather before the root runs;
reducing and freeing come at the end of the backward, when FSDP does so for each unit that has not had its turn.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .sharding_policy import ShardingPolicy

NAME = "adapters_of_all_layers"


class AdapterUnit(nn.Module):
    """Holds nothing but FSDP's state."""


def lora_parts(module: nn.Module) -> list[nn.Module]:
    """Return the trained modules that a LoRA layer runs. A unit is gathered when its modules run."""
    if not isinstance(module, LoraLayer):
        return []
    groups = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    parts = [part for group in groups for part in group.values()]
    return [part for part in parts if all(parameter.requires_grad for parameter in part.parameters())]


def adapter_parameters(root: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the trained modules that the LoRA layers below a module run."""
    parts = [part for child in root.modules() for part in lora_parts(child)]
    return {parameter for part in parts for parameter in part.parameters()}


def shard_together(root: nn.Module, policy: ShardingPolicy, mesh: DeviceMesh) -> None:
    """Make the adapters of all layers, which no unit of theirs holds, one unit that is gathered when the root runs.

    Args:
        root (`nn.Module`): The outermost module, with its hooks of FSDP still to come.
        policy (`ShardingPolicy`): How to cut.
        mesh (`DeviceMesh`): The ranks.
    """
    parts = [part for child in root.modules() for part in lora_parts(child)]
    if not parts:
        return
    unit: Any = AdapterUnit()
    unit._modules.update({str(index): part for index, part in enumerate(parts)})
    policy.fully_shard(unit, mesh, set(), reshard_after_forward=False)
    unit._modules.clear()  # or each would have two names
    root.add_module(NAME, unit)


def gather_with(root: Any) -> None:
    """Have the adapters gathered whenever the root runs, which has its hooks of FSDP by now."""
    unit = getattr(root, NAME, None)
    if unit is None:
        return
    root.register_forward_pre_hook(functools.partial(_gather, unit))  # behind FSDP's own
    if hasattr(root, "generate"):
        root.generate = functools.partial(_gather_and_run, unit, root.generate)


def _gather(unit: Any, root: Any, args: Any) -> None:
    unit.unshard()


def _gather_and_run(unit: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    unit.unshard()
    return function(*args, **kwargs)

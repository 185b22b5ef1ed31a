"""Which layers run fused, and which PEFT's own way.

`kernels/` computes a 4-bit layer with its adapter as one function. `fuse_lora` gives that function to each layer that
it describes, as the `forward` of the instance: the layer stays PEFT's, with its parameters, names and methods.

PEFT's layer can do more than the function: dropout, DoRA, several adapters, a trained bias. Where a layer is built for
one of these, it keeps PEFT's forward, and one line says so. What changes from call to call is looked at in each call,
and PEFT's forward runs when it is anything but the usual: adapters switched off or merged, another one made active, one
chosen by row (`adapter_names`), a hook on a part that the function does not call, parts that became FSDP units of their
own and are gathered only when called, or numbers in another dtype than that of the product.

Layers that read one input (queries, keys and values; gate and up) are one function where they are called on one and the
same tensor, one after the other: the first call computes them all, and the others take what is there.

A gated MLP whose three layers are fused becomes one function as well (`kernels/swiglu.py`), if its `forward` is,
instruction for instruction, that of transformers' `LlamaMLP`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from ..experts.lora import ParamWrapper
from ..kernels.joined_product import JoinedLayers
from ..kernels.lora_group import apply_lora_group
from ..kernels.lora_linear import LoraWeights, apply_lora_linear
from ..kernels.swiglu import apply_swiglu
from ..packed_linear import PackedLinear4bit
from ..ranks import log_once
from ..units import format_dtype

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class FusionReport:
    """What was fused.

    Args:
        num_fused (`int`): LoRA layers that run fused.
        num_mlps (`int`): Gated MLPs that run as one function, their layers among the former.
        num_groups (`int`): Other groups of layers that read one input and do, too.
        unfused (`Counter[str]`): Why the other LoRA layers do not, with their numbers.
    """

    num_fused: int = 0
    num_mlps: int = 0
    num_groups: int = 0
    unfused: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """Return one line: `"PEFT's own forward ... 7 of 224 LoRA layers: 7 with dropout (...)"`."""
        total = self.num_fused + self.unfused.total()
        reasons = "; ".join(f"{number} {reason}" for reason, number in self.unfused.most_common())
        return f"PEFT's own forward, which is slower, runs in {self.unfused.total()} of {total} LoRA layers: {reasons}."


class FusedLora:
    """The forward of a LoRA layer around a packed 4-bit one: fused if the call is a usual one, PEFT's otherwise.

    Args:
        layer (`peft.tuners.lora.bnb.Linear4bit`): The layer.
        adapter_name (`str`): Its adapter.
    """

    def __init__(self, layer: Linear4bit, adapter_name: str) -> None:
        base, lora_a, lora_b = layer.base_layer, layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        self.layer = layer
        self.adapter_name = adapter_name
        self.group: FusedGroup | None = None
        self.usual_names = (adapter_name, [adapter_name])
        self.weights = LoraWeights(base, lora_a, lora_b)
        # Read in each call, where looking them up in modules would take as long as a small kernel.
        self.current = ((layer.lora_A._modules, lora_a), (layer.lora_B._modules, lora_b), (layer._modules, base))
        self.base_parameters = base._parameters
        self.in_features = base.in_features
        self.inner_hooks = [getattr(part, name) for part in (base, lora_a, lora_b) for name in _HOOKS]
        self.outer_hooks = [getattr(layer, name) for name in _HOOKS]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.is_usual(x):
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        if self.group is not None and (y := self.group.take(self, x)) is not None:
            return y
        return apply_lora_linear(x, self.weights, self.layer.scaling[self.adapter_name])

    def is_usual(self, x: torch.Tensor) -> bool:
        """Return whether the fused function computes what PEFT's forward would for this input."""
        layer, weights, name = self.layer, self.weights, self.adapter_name
        (a_parts, lora_a), (b_parts, lora_b), (parts, base) = self.current
        if (
            layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter not in self.usual_names
            or a_parts.get(name) is not lora_a
            or b_parts.get(name) is not lora_b
            or parts.get("base_layer") is not base
            or type(lora_a) is not nn.Linear  # FSDP changes the class of what becomes a unit
            or type(lora_b) is not nn.Linear
            or any(self.inner_hooks)
        ):
            return False
        bias = self.base_parameters.get("bias")
        if bias is not None and bias.requires_grad:
            return False
        dtype = x.dtype
        if dtype != base.compute_dtype or dtype != weights.lora_a.weight.dtype:
            _say_dtypes_differ(dtype, weights.lora_a.weight.dtype, base.compute_dtype)
            return False
        device_type = x.device.type
        return not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) == dtype


class FusedGroup:
    """Layers that read one input: the first one that is called computes all, and keeps the others' for them.

    Whether they do read one input shows when they run. Where what was kept is still there when the next input comes,
    and the one after, the layers go on by themselves. (Once may be an exception that came between their calls.)

    Args:
        layers (`tuple[FusedLora, ...]`): The layers, in the order of their calls.
    """

    def __init__(self, layers: tuple[FusedLora, ...]) -> None:
        self.layers = layers
        self.weights = tuple(layer.weights for layer in layers)
        self.x: torch.Tensor | None = None
        self.kept: dict[int, torch.Tensor] = {}
        self.num_left = 0

    def take(self, layer: FusedLora, x: torch.Tensor) -> torch.Tensor | None:
        """Return what a layer puts out for x, `None` where it has to compute that itself."""
        if layer is self.layers[0]:
            return None if self.num_left == 2 else self._compute(x)
        if self.x is not x:
            return None
        y = self.kept.pop(id(layer), None)
        if not self.kept:
            self.x, self.num_left = None, 0
        return y

    def forget(self) -> None:
        """Let go of what is kept, and of all that its graph holds: the layers that it was for are not called."""
        self.x = None
        self.kept.clear()

    def _compute(self, x: torch.Tensor) -> torch.Tensor | None:
        others = self.layers[1:]
        if self.kept:  # the last input was not that of all
            self.num_left += 1
            self.forget()
        if self.num_left == 2 or not all(layer.is_usual(x) for layer in others):
            return None
        scalings = tuple(layer.layer.scaling[layer.adapter_name] for layer in self.layers)
        y, *rest = apply_lora_group(x, self.weights, scalings)
        self.x, self.kept = x, {id(layer): output for layer, output in zip(others, rest, strict=True)}
        return y


class FusedMLP:
    """The forward of a gated MLP: one function if every layer of it would run fused, the class's own otherwise.

    Args:
        mlp (`nn.Module`): The MLP, whose layers are fused.
    """

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = mlp
        self.layers = tuple(getattr(mlp, name).forward for name in _MLP_PARTS)
        *inner, self.down = (layer.weights for layer in self.layers)
        self.gate_and_up = JoinedLayers(inner)
        self.parts = mlp._modules
        self.hooks = [hooks for layer in self.layers for hooks in layer.outer_hooks]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.layers
        parts = self.parts
        if (
            any(self.hooks)
            or parts["gate_proj"] is not gate.layer
            or parts["up_proj"] is not up.layer
            or parts["down_proj"] is not down.layer
            or not (gate.is_usual(x) and up.is_usual(x) and down.is_usual(x))
        ):
            return type(self.mlp).forward(self.mlp, x)
        scalings = tuple(layer.layer.scaling[layer.adapter_name] for layer in self.layers)
        return apply_swiglu(x, self.gate_and_up, self.down, scalings)


def fuse_lora(model: nn.Module) -> FusionReport:
    """Let the LoRA layers of a model run fused, where that computes the same. Says in one line where it does not.

    Can be called again, after another adapter was made active, say. Gradients and outputs differ from PEFT's by
    rounding, of which there is less.

    Args:
        model (`nn.Module`): A `PeftModel` with packed 4-bit layers, sharded or not.
    Returns:
        `FusionReport`: What was fused, and why not the rest.
    """
    unfuse_lora(model)
    report = FusionReport()
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):  # experts have a way of their own
            reason = _find_obstacle(module)
            if reason:
                report.unfused[reason] += 1
            else:
                module.forward = FusedLora(module, module.active_adapters[0])
                report.num_fused += 1
    for module in model.modules():
        if _is_fusible_mlp(module):
            module.forward = FusedMLP(module)
            report.num_mlps += 1
    for module in model.modules():
        for names in _GROUPS:
            layers: tuple[Any, ...] = tuple(getattr(module._modules.get(name), "forward", None) for name in names)
            if _is_group(layers) and not isinstance(module.forward, FusedMLP):
                group = FusedGroup(layers)
                for layer in layers:
                    layer.group = group
                report.num_groups += 1
    if report.unfused:
        log_once("%s", report.describe())
    return report


def unfuse_lora(model: nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), (FusedLora, FusedMLP)):
            del module.forward


def forget_outputs(model: nn.Module) -> None:
    """Let groups of layers go of what they keep for calls that will not come, since a step was left in between."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FusedLora) and forward.group is not None:
            forward.group.forget()


def _find_obstacle(layer: LoraLayer) -> str | None:
    """Return why a layer cannot run fused, in words that follow a number of layers."""
    if not isinstance(layer, Linear4bit) or type(layer.base_layer) is not PackedLinear4bit:
        return "around what is no packed 4-bit linear layer"
    if "forward" in layer.__dict__ or "forward" in layer.base_layer.__dict__:
        return "whose forward was replaced by another library"
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A:
        return f"with {len([name for name in names if name in layer.lora_A])} active adapters"
    name = names[0]
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant:
        return "with DoRA or another variant of LoRA"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "with dropout (lora_dropout=0 fuses them)"
    if lora_b.bias is not None:
        return "with lora_bias"
    if layer.base_layer.bias is not None and layer.base_layer.bias.requires_grad:
        return "with a trained bias"
    if isinstance(lora_a, FSDPModule) or isinstance(lora_b, FSDPModule):
        return "whose adapters are FSDP units of their own (give peft_config to load_quantized_model to fuse them)"
    return None


def _is_group(layers: tuple[Any, ...]) -> bool:
    return all(isinstance(layer, FusedLora) for layer in layers) and len({layer.in_features for layer in layers}) == 1


def _is_fusible_mlp(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in _MLP_PARTS]
    if not all(isinstance(layer, nn.Module) and isinstance(layer.forward, FusedLora) for layer in layers):
        return False
    mine, theirs = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    return (
        "forward" not in module.__dict__
        and mine is not None
        and (mine.co_code, mine.co_names, mine.co_consts) == (theirs.co_code, theirs.co_names, theirs.co_consts)
        and isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"])))
    )


_said: set[tuple[torch.dtype, ...]] = set()


def _say_dtypes_differ(*dtypes: torch.dtype) -> None:
    if dtypes not in _said:
        _said.add(dtypes)
        x, lora, compute = map(format_dtype, dtypes)
        log_once(
            "A LoRA layer was given %s, its adapter is in %s, and its product is computed in %s, so PEFT's own forward "
            "runs, which is slower. All three are param_dtype where FSDP gathers them.",
            x,
            lora,
            compute,
        )

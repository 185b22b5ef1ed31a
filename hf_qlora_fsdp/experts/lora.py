"""LoRA on experts, as PEFT means it, without ever making a weight.

PEFT adapts experts through `target_parameters`: a `ParamWrapper` around the module for each parameter, the wrapper of
`gate_up_proj` inside that of `down_proj`. Its forward replaces the whole stack of 16-bit weights by `W + s B A`, which
packed weights cannot be added to. The wrapper here has the same names and factors, so that stock PEFT loads what it
saves and the other way round, but a forward of its own: it hands itself on to the experts, and they ask it for
`s (x A) B`, row by row of the expert that the row was sent to.

Each wrapper holds the factors of all E experts: `lora_A [E r, K]`, expert by expert, and `lora_B [N, r E]`, in which
the expert is what changes fastest. They are applied by calling the modules that hold them, as in any other LoRA layer,
so that FSDP sees them run. An expert without rows gets gradients of zero (`grouping.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from .grouping import Groups, grouped_product


class ExpertsA(nn.Linear):
    """The factors A of all experts, `[E r, K]`.

    Args:
        linear (`nn.Linear`): The layer of PEFT whose weight this takes over.
        num_experts (`int`): E.
    """

    def __init__(self, linear: nn.Linear, num_experts: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.num_experts = num_experts
        self.weight = linear.weight

    def forward(self, x_SK: torch.Tensor, groups: Groups) -> torch.Tensor:  # type: ignore[override]
        """Return `[S, r]`."""
        w_ErK = self.weight.to(x_SK.dtype).unflatten(0, (self.num_experts, -1))
        return grouped_product(x_SK, w_ErK.transpose(1, 2), groups)


class ExpertsB(ExpertsA):
    """The factors B of all experts, `[N, r E]`."""

    def forward(self, x_SK: torch.Tensor, groups: Groups) -> torch.Tensor:  # type: ignore[override]
        """Return `[S, N]`."""
        w_NrE = self.weight.to(x_SK.dtype).unflatten(1, (-1, self.num_experts))
        return grouped_product(x_SK, w_NrE.permute(2, 1, 0).contiguous(), groups)


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of one parameter of a module of experts, for `layers.Experts4bit`.

    It has PEFT's name because PEFT asks for it (`_inject_parameters` in peft/tuners/tuners_utils.py). PEFT makes it
    instead of its own where a config says so: `config._register_custom_module({Experts4bit: ParamWrapper})`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None, config: LoraConfig, **kwargs: Any
    ) -> None:
        if parameter_name is None:
            raise ValueError(
                f"peft_config has target_modules={config.target_modules!r}, by which experts are adapted as modules, "
                "but they are parameters. Use target_modules='all-linear', or leave them out there and add "
                "target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']."
            )
        wanted = {name: getattr(config, name) for name in ("use_dora", "lora_bias", "lora_dropout", "fan_in_fan_out")}
        for name, value in wanted.items():
            if value:
                raise ValueError(
                    f"peft_config has {name}={value}, and adapts {parameter_name!r} of experts, for which PEFT has no "
                    f"such thing. Leave {name} out, or adapt attention alone, with "
                    "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']."
                )
        super().__init__(base_layer, adapter_name, parameter_name, config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts: Any = self.get_base_layer()
        if self.parameter_name not in experts.shapes:
            raise ValueError(
                f"target_parameters has {self.parameter_name!r}, but of experts in 4 bits only the projections "
                f"{list(experts.shapes)} are adapted. Leave it out."
            )
        self._param_ndim = 3
        self.num_experts, in_features, out_features = experts.shapes[self.parameter_name]
        return in_features, out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self.lora_A[adapter_name] = ExpertsA(self.lora_A[adapter_name], self.num_experts)
        self.lora_B[adapter_name] = ExpertsB(self.lora_B[adapter_name], self.num_experts)

    def forward(self, x: torch.Tensor, *args: Any, adapters: tuple[ParamWrapper, ...] = (), **kwargs: Any) -> Any:
        self._check_forward_args(x, *args, **kwargs)
        return self.base_layer(x, *args, adapters=(*adapters, self), **kwargs)

    def delta(self, x_SK: torch.Tensor, groups: Groups) -> torch.Tensor | None:
        """Return what the active adapters add to the product of this parameter, `[S, N]`.

        Args:
            x_SK (`torch.Tensor`): The rows that went into the product.
            groups (`Groups`): Which rows belong to which expert.
        """
        total = None
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.lora_A:
                reduced = self.lora_A[name](x_SK, groups) * self.scaling[name]
                delta = self.lora_B[name](reduced, groups)
                total = delta if total is None else total + delta
        return total

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "merge() was called on experts in 4 bits, whose packed weights nothing can be added to. Save the adapter "
            "and merge it into the 16-bit checkpoint: `hf-qlora-fsdp merge`."
        )

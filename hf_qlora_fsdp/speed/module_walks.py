"""Walking through a model's modules once instead of in every step.

Between two steps the GPU waits for Python, and Python walks: `model.train()` visits every module, clipping collects all
parameters twice, `zero_grad` visits them, and counting operations adds up their sizes. With LoRA on all layers a model
of 8 billion parameters has thousands of modules, and 448 parameters that are trained; none of them changes from step to
step. What is walked here is only what can have changed.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def spare_walks(model: Any, layers: list[nn.Module]) -> list[nn.Parameter]:
    """Let `train` and `zero_grad` of a model visit only what they would change.

    Args:
        model (`nn.Module`): The sharded model, whose trained parameters are settled.
        layers (`list[nn.Module]`): Its decoder layers. Where each of them, and the model, is in the mode that is asked
            for, everything is taken to be.
    Returns:
        `list[nn.Parameter]`: What is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train = functools.partial(_train, model, [model, base, *layers])
    model.zero_grad = functools.partial(_zero_grad, model, trained)
    return trained


def _train(model: nn.Module, watched: list[nn.Module], mode: bool = True) -> nn.Module:
    if any(module.training is not mode for module in watched):
        type(model).train(model, mode)
    return model


def _zero_grad(model: nn.Module, trained: list[nn.Parameter], set_to_none: bool = True) -> None:
    if not set_to_none or not all(parameter.requires_grad for parameter in trained):
        type(model).zero_grad(model, set_to_none)
        return
    for parameter in trained:
        parameter.grad = None

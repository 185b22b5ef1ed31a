"""What is not visited would not have changed; and whatever may have, is."""

from __future__ import annotations

import torch
from torch import nn

from hf_qlora_fsdp.speed.module_walks import spare_walks


def make_model() -> tuple[nn.Module, list[nn.Module]]:
    layers = [nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for _ in range(2)]
    model = nn.Sequential(*layers)
    model[0][0].requires_grad_(False)
    return model, layers


def test_the_mode_is_set_wherever_it_is_not() -> None:
    model, layers = make_model()
    spare_walks(model, layers)
    model.eval()
    assert not any(module.training for module in model.modules())
    assert model.train() is model and all(module.training for module in model.modules())
    layers[1].eval()
    model.train()
    assert all(module.training for module in model.modules())


def test_gradients_of_what_is_trained_are_dropped() -> None:
    model, layers = make_model()
    trained = spare_walks(model, layers)
    assert [id(p) for p in trained] == [id(p) for p in model.parameters() if p.requires_grad]
    model(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    model.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in trained)

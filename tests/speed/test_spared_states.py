"""Random states are kept wherever somebody may ask for random numbers, and code that is not known may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_qlora_fsdp.speed.spared_states import draws_random_numbers, spare_random_states
from tests.tiny import make_model


class SomebodysLayer(nn.Linear):
    """Draws, and nothing but its code says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "mixtral"])
def test_usual_models_draw_nothing(family: str) -> None:
    model = make_model(family)
    generator_state = torch.get_rng_state()
    model.train()(input_ids=torch.arange(5, 25)[None])
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert not draws_random_numbers(model, model.config)


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {"attention_dropout": 0.1}), ("mixtral", {"router_jitter_noise": 0.01})]
)
def test_the_config_may_ask_for_random_numbers(family: str, overrides: dict[str, Any]) -> None:
    model = make_model(family, **overrides)
    generator_state = torch.get_rng_state()
    model.train()(input_ids=torch.arange(5, 25)[None])
    assert not torch.equal(torch.get_rng_state(), generator_state)
    assert draws_random_numbers(model, model.config)


@pytest.mark.parametrize(("rates", "draws"), [([0.0, 0.1], True), ([0.0, 0.0], False)])
def test_a_list_of_rates_is_read(rates: list[float], draws: bool) -> None:
    model = make_model("llama")
    model.config.layer_dropout = rates
    assert draws_random_numbers(model, model.config) is draws


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_adapter_may(dropout: float) -> None:
    base = make_model("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=dropout))
    assert draws_random_numbers(model, base.config) is (dropout > 0)


def test_code_that_is_not_known_may() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj = SomebodysLayer(128, 256)
    assert draws_random_numbers(model, model.config)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False, "preserve_rng_state": True}])
def test_what_is_asked_for_is_left_as_it_is(options: Any) -> None:
    model = make_model("llama")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    before = model.model.layers[0]._gradient_checkpointing_func.keywords
    spare_random_states(model)
    after = model.model.layers[0]._gradient_checkpointing_func.keywords
    assert after == before | {"preserve_rng_state": options is not None}


def test_without_gradient_checkpointing_nothing_is_touched() -> None:
    model = make_model("llama")
    spare_random_states(model)
    assert not any("_gradient_checkpointing_func" in vars(module) for module in model.modules())

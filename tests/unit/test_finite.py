"""Where NaN and infinity begin: a parameter that holds them, or the module that computes them first."""

from __future__ import annotations

import pytest
import torch

from secateur.finite import first_not_finite
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, attach_lora

IDS = torch.arange(14).reshape(2, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(value: float) -> None:
    model = TINY["llama-gqa"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        model.lm_head.weight[0, 0] = value
    assert first_not_finite(model, IDS) == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("adapters", [False, True])
def test_the_module_that_overflows_first_is_named(adapters: bool) -> None:
    model = TINY["llama-gqa"]()
    model = attach_lora(model, LoraSettings(), 0) if adapters else model
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    with torch.no_grad():
        layer.weight.fill_(3e38)
    name = first_not_finite(model, IDS)
    assert "layers.1.mlp.down_proj" in str(name)
    assert not any(module._forward_hooks for module in model.modules())


def test_finite_logits_are_no_complaint() -> None:
    model = TINY["llama-gqa"]()
    assert first_not_finite(model, IDS) is None
    model.register_parameter("unused", torch.nn.Parameter(torch.tensor([float("nan")])))
    assert first_not_finite(model, IDS) is None

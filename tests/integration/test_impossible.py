"""What a method cannot do is found in the rehearsal: before text is read through the model, and nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from secateur import stages
from secateur.config import load_recipe
from secateur.errors import SecateurError
from secateur.surgery import checked_trace
from secateur.testing.tiny import build


@pytest.mark.parametrize(
    ("family", "method", "settings", "message"),
    [
        ("llama-gqa", "shortgpt", {"budget.kinds": "[ffn]"}, r"budget\.kinds=\[layer\]"),
        ("mixtral", "flap", {}, "not the weight of a linear"),
        ("llama-gqa", "loraprune", {"lora.targets": "[q_proj]"}, r"layers\.0\.mlp.*lora\.targets"),
        ("llama-gqa", "loraprune", {"lora.targets": "[nothing]"}, "finds no linear module"),
        ("llama-gqa", "lorashear", {"lora.targets": "[nothing]"}, "finds no linear module"),
        ("llama-gqa", "magnitude", {"lora.targets": "[nothing]"}, "finds no linear module"),  # recovery needs it
        (
            "llama-gqa",
            "lorashear",
            {"lora.targets": "[gate_proj, up_proj]", "method.saliency": "{lora: 1}", "method.warmup_steps": "1"},
            r"'lora' cannot score layers\.0\.attention.*lora\.targets",
        ),
        (
            "llama-gqa",
            "lorashear",
            {"lora.targets": "[q_proj]", "method.saliency": "{hesso-lora-cosine: 1}", "method.warmup_steps": "1"},
            r"'hesso-lora-cosine' cannot score layers\.0\.mlp.*lora\.targets",
        ),
        ("mixtral", "lorashear", {"method.saliency": "{lora: 1}", "method.warmup_steps": "1"}, "'lora' cannot score"),
        ("mixtral", "loraprune", {}, "none of its weights is a linear layer with a LoRA adapter"),
        ("llama-gqa", "flap", {"recovery.repair": "true"}, r"combined.*method\.compensate=false"),
        ("llama-gqa", "loraprune", {"evaluation.baseline": "shortgpt"}, r"baseline shortgpt.*evaluation\.baseline"),
    ],
)
def test_the_rehearsal_refuses(family: str, method: str, settings: dict[str, Any], message: str) -> None:
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(None, overrides, {"method": method, "budget.ratio": 0.1})
    with pytest.raises(SecateurError, match=message):
        stages.rehearse(model, checked_trace(model, recipe.budget.kinds), recipe)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "settings"),
    [("loraprune", []), ("flap", []), ("lorashear", ["method.saliency={lora: 1}", "method.warmup_steps=1"])],
)
def test_the_rehearsal_lets_the_possible_through_and_leaves_the_model_as_it_was(
    method: str, settings: list[str]
) -> None:
    model = build("llama-gqa")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    recipe = load_recipe(None, settings, {"method": method})
    stages.rehearse(model, checked_trace(model, recipe.budget.kinds), recipe)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any("lora_" in name for name, _ in model.named_parameters())

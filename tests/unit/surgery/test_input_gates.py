"""Gates on the inputs of consumers compute what the folded weights compute, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.surgery import InputGates, folded, masked, updated
from secateur.testing.contracts import ids, logits, uneven, with_adapters
from secateur.testing.tiny import TINY
from secateur.walk import recomputed

FAMILIES = ("llama-gqa", "llama-bias", "qwen2", "gemma2", "gpt2", "phi3", "olmo2", "falcon-new")


def multipliers(graph: Any) -> dict[str, torch.Tensor]:
    """Some below and some above 1."""
    generator = torch.Generator().manual_seed(4)
    return {group.name: 0.5 + torch.rand(group.size, generator=generator) for group in graph.prunable}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gated_model_is_the_folded_one(family: str) -> None:
    model = TINY[family]()
    graph, dense = trace(model), logits(model)
    values = multipliers(graph)
    with InputGates(model, graph, values) as gates:
        assert torch.equal(logits(model), dense)
        gates.set(values)
        gated = logits(model)
        assert float((gated - dense).abs().max()) > 1e-2
        kept = uneven(graph)
        gone = {name: values[name].clone() for name in values}
        for name, units in kept.items():
            gone[name][[unit for unit in range(graph[name].size) if unit not in units]] = 0.0
        if family != "olmo2":  # its norm runs over the kept units only once the others are gone
            gates.set(gone)
            with_holes = logits(model)
        gates.set(None)
        assert torch.equal(logits(model), dense)
    with updated(model, folded(model, graph, values)):
        torch.testing.assert_close(logits(model), gated, atol=1e-5, rtol=1e-5)
        if family != "olmo2":
            with masked(model, graph, kept):
                torch.testing.assert_close(logits(model), with_holes, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), dense)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapters_of_the_consumer_are_folded_too() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    values = multipliers(graph)
    adapted = with_adapters(model)
    with InputGates(model, graph, values) as gates:
        gates.set(values)
        gated = logits(model)
    updates = folded(model, graph, values)
    assert set(updates) == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    for layer in adapted.base_model.model.model.layers:
        for consumer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(consumer.lora_B["default"].weight)
    merged = adapted.merge_and_unload()
    with updated(merged, updates):
        torch.testing.assert_close(logits(merged), gated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_gates_have_the_gradient_of_the_folded_columns(again: bool) -> None:
    """Σ over a unit's columns of w · ∂L/∂w at m = 1, also where activations are computed again."""
    model = TINY["llama-gqa"]()
    graph, tokens = trace(model), ids(model)
    values = {group.name: torch.ones(group.size, requires_grad=True) for group in graph.prunable}
    with InputGates(model, graph, values) as gates, recomputed(model, again):
        gates.set(values)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    down = model.model.layers[1].mlp.down_proj.weight
    expected = (down.detach() * down.grad).sum(0)
    torch.testing.assert_close(values["layers.1.mlp"].grad, expected, atol=1e-6, rtol=1e-4)


def test_stacked_experts_are_refused() -> None:
    model = TINY["mixtral"]()
    graph = trace(model)
    with pytest.raises(ModelError, match="not the weight of a linear"):
        InputGates(model, graph, [group.name for group in graph.prunable])
    assert not any(module._forward_pre_hooks for module in model.modules())

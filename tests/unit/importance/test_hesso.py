"""HESSO's proxies against the slow reference, and what LoRA as a stand-in for the gradient must agree with."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import hesso

from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.importance import CRITERIA
from secateur.testing.tiny import TINY, VOCAB
from secateur.training import LoraSettings, attach_lora
from secateur.walk import Calibration

PROXIES = ("magnitude", "average-magnitude", "cosine", "first-order", "second-order")


def blocks() -> Calibration:
    return Calibration(
        TokenBlocks(torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0)), ("noise",) * 4)
    )


def adapted(family: str) -> Any:
    model = attach_lora(TINY[family](), LoraSettings(rank=3, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if ".lora_B." in path:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(named.values()), allow_unused=True)
    return {name: -gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "olmo2", "mixtral"])
def test_by_gradients_it_is_the_reference(family: str, proxy: Any) -> None:
    model, text = TINY[family](), blocks()
    graph = trace(model)
    scores = CRITERIA[f"hesso-{proxy}"]().score(model, graph, text, seed=0)
    downhill = gradients(model, text.ids)
    for group in graph.prunable:
        expected = torch.tensor(hesso(model, group, proxy, downhill))
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("proxy", ["cosine", "first-order", "second-order"])
@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "mixtral"])
def test_by_adapters_it_is_the_reference_with_what_they_add(family: str, proxy: Any) -> None:
    model = adapted(family)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    after = dict(merged.named_parameters())
    delta = {name: (after[name] - weight).detach() for name, weight in model.named_parameters()}
    graph = trace(model)
    scores = CRITERIA[f"hesso-lora-{proxy}"]().score(model, graph, None, seed=0)
    for group in graph.prunable:
        expected = torch.tensor(hesso(model, group, proxy, delta))
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("proxy", ["cosine", "first-order", "second-order"])
def test_adapters_that_made_one_step_downhill_rank_as_the_gradient_does(proxy: Any) -> None:
    """γ B A = −η ∇f exactly, which a LoRA of full rank can be: the stand-in is the gradient up to its length."""
    plain, text = TINY["llama-gqa"](), blocks()
    downhill = gradients(plain, text.ids)
    by_gradient = CRITERIA[f"hesso-{proxy}"]().score(plain, trace(plain), text, seed=0)
    model = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=48, alpha=48), seed=0)
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            name = path.removeprefix("base_model.model.") + ".weight"
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.data = torch.eye(48)[:, : a.shape[1]] if a.shape[1] <= 48 else a.data
            b.data = 0.01 * downhill[name] @ torch.linalg.pinv(a.data)
    by_adapters = CRITERIA[f"hesso-lora-{proxy}"]().score(model, trace(model), None, seed=0)
    power = {"cosine": 0, "first-order": 1, "second-order": 2}[proxy]
    for name in by_gradient:
        expected = by_gradient[name] * 0.01**power
        torch.testing.assert_close(by_adapters[name], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_unit_that_training_takes_to_the_origin_scores_lowest_by_cosine() -> None:
    """The sign that the released optimiser has the other way round for true gradients."""
    model = adapted("llama-gqa")
    graph = trace(model)
    group = next(group for group in graph.prunable if group.kind == "ffn")
    for member in group.members:
        if member.role == "out" and ".lora_" not in member.parameter:
            layer = model.get_submodule(member.parameter.removesuffix(".base_layer.weight"))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = layer.base_layer.weight
            weight.data[0] = -(b[0] @ a).detach()  # what LoRA adds points back to the origin
            weight.data[1] = (b[1] @ a).detach()
    scores = CRITERIA["hesso-lora-cosine"]().score(model, graph, None, seed=0)[group.name]
    assert scores[0] == pytest.approx(0.0, abs=1e-5)
    assert scores[1] == pytest.approx(2.0, abs=1e-5)


def test_bug_of_the_released_optimiser_average_magnitude_is_a_criterion_of_its_own() -> None:
    """There 'magnitude' in the name caught both, so that the average never ran (and its normaliser failed)."""
    model = TINY["llama-gqa"]()
    graph = trace(model)
    whole, average = (
        CRITERIA[name]().score(model, graph, None, 0) for name in ("hesso-magnitude", "hesso-average-magnitude")
    )
    sizes = {group.name: whole[group.name] / average[group.name] for group in graph.prunable}
    assert len({int(size[0].round()) for size in sizes.values()}) > 1
    assert all(torch.allclose(size, size[0]) for size in sizes.values())


def test_adapters_are_asked_for() -> None:
    model = TINY["llama-gqa"]()
    with pytest.raises(ModelError, match="attach and train"):
        CRITERIA["hesso-lora-cosine"]().score(model, trace(model), None, 0)


@pytest.mark.parametrize("criterion", ["hesso-lora-cosine", "hesso-lora-first-order", "lora"])
def test_groups_without_an_adapter_are_refused_not_scored_zero(criterion: str) -> None:
    model = attach_lora(TINY["llama-gqa"](), LoraSettings(targets=("gate_proj", "up_proj", "down_proj")), seed=0)
    graph = trace(model)
    with pytest.raises(ModelError, match=r"cannot score layers\.0\.attention.*lora\.targets.*budget\.protect"):
        CRITERIA[criterion]().score(model, graph, blocks(), 0)
    ffn = replace(graph, groups=tuple(group for group in graph if group.kind == "ffn"))
    assert len(CRITERIA[criterion]().score(model, ffn, blocks(), 0).values) == 2


def test_a_layer_without_an_adapter_is_refused_and_one_with_some_is_not() -> None:
    def score(target: str) -> Any:
        model = attach_lora(TINY["llama-gqa"](), LoraSettings(targets=(target,)), seed=0)
        graph = trace(model).opened(["layer"])
        layers = replace(graph, groups=tuple(group for group in graph if group.kind == "layer"))
        return CRITERIA["hesso-lora-first-order"]().score(model, layers, None, 0)["layers"]

    assert len(score("up_proj")) == 2
    with pytest.raises(ModelError, match="cannot score layers:"):
        score("layers.1.mlp.up_proj")


def test_adapters_that_are_merged_say_nothing() -> None:
    model = adapted("llama-gqa")
    graph = trace(model)
    model.merge_adapter()
    with pytest.raises(ModelError, match="cannot score"):
        CRITERIA["hesso-lora-cosine"]().score(model, graph, None, 0)

"""The estimate against the true gradient: what theory says, and what training does to it, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripts import script

from secateur.graph import trace
from secateur.importance import LoRA
from secateur.planning.stacks import comparable
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.training import LoraSettings, TrainingSettings, attach_lora, train
from secateur.units import sum_rows
from secateur.walk import Calibration

estimate = script("lora_estimate")
ALL, compare_with_true_gradient, spearman = estimate.ALL, estimate.compare_with_true_gradient, estimate.spearman


def adapted(rank: int, family: str = "llama-gqa") -> Any:
    return attach_lora(build(family), LoraSettings(rank=rank, alpha=2 * rank), seed=0)


def mean(found: Any, side: str, kind: str = "ffn") -> float:
    values = [item.correlation for item in found if item.side == side and item.kind == kind]
    return sum(values) / len(values)


def test_ranks() -> None:
    a = torch.tensor([0.1, 5.0, 2.0, 3.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert abs(spearman(torch.randn(4000), torch.randn(4000))) < 0.06


def test_at_the_start_producers_are_estimated_well_and_consumers_hardly() -> None:
    """With B = 0 the estimate is G AᵀA: rows keep their size, columns are mixed by A."""
    found = compare_with_true_gradient(model := adapted(rank=8), trace(model), Calibration(noise(8, 1)))
    assert mean(found, "out") > 0.8
    assert mean(found, "in") < mean(found, "out") - 0.2
    assert mean(found, "out for both") > mean(found, "both")  # why LoRAPrune leaves the input side out by default


def test_a_whole_basis_gives_the_true_ranking() -> None:
    model = adapted(rank=48)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.orthogonal_(parameter)
    every = compare_with_true_gradient(model, trace(model), Calibration(noise(4, 1)))
    found = [item for item in every if item.side == "in"]
    # down_proj takes in 40 channels and o_proj 48, so that 48 rows of A span both
    assert found
    assert all(item.correlation > 0.99 for item in found if item.kind == "ffn")
    assert all(item.overlap == 1.0 for item in found if item.kind == "ffn")


def test_between_groups_it_is_the_ranking_that_planning_would_make() -> None:
    """One number for all units, by the scores that LoRAPrune has by default, each by the parameters it frees."""
    model, text = adapted(rank=8), Calibration(noise(8, 1))
    graph = trace(model)
    for options in (LoRA(normalise=True), LoRA()):
        *_, last = compare_with_true_gradient(model, graph, text, options)
        assert (last.group, last.kind, last.side) == (ALL, ALL, "out")
    scores = LoRA().score(model, graph, text, 0)
    assert scores.of_loss
    plain = trace(build("llama-gqa"))
    guess = torch.cat(
        [comparable(scores[group.name], plain.unit_cost(group), "parameters") for group in plain.prunable]
    )
    assert last.correlation == pytest.approx(spearman(guess, true_scores(plain, text)), abs=1e-6)
    assert last.correlation > 0.6


def true_scores(plain: Any, text: Any) -> torch.Tensor:
    """Σ |G W| over the rows of what produces each unit, by the parameters that go with it, from a plain backward."""
    dense = build("llama-gqa")  # B = 0, so that it is the same function
    dense(input_ids=text.ids, labels=text.ids).loss.backward()
    weights = dict(dense.named_parameters())
    parts = []
    for group in plain.prunable:
        total = torch.zeros(group.size)
        for member in group.members:
            if member.role == "out":
                weight = weights[member.parameter]
                assert weight.grad is not None
                total += sum_rows((weight * weight.grad).detach().abs().sum(1), member, group.size)
        parts.append(total / plain.unit_cost(group))
    return torch.cat(parts)


def test_training_teaches_the_consumers_side() -> None:
    """Once B has grown, B Bᵀ G adds what A alone cannot see."""
    model = adapted(rank=8)
    graph = trace(model)
    before = mean(compare_with_true_gradient(model, graph, Calibration(noise(8, 1))), "in")
    train(
        model,
        noise(16, 2).ids,
        TrainingSettings(batch_size=8, precision="fp32", learning_rate=3e-2, schedule="constant"),
        steps=20,
        seed=0,
        description="",
    )
    assert mean(compare_with_true_gradient(model, graph, Calibration(noise(8, 1))), "in") > before


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(rank=4)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    compare_with_true_gradient(model, trace(model), Calibration(noise(4, 1)), LoRA(form="squared"))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None

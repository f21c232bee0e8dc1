"""Allocation on the traced graphs of many families: what is planned is what slicing leaves."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, get_peft_model

from secateur.errors import PlanError
from secateur.graph import trace
from secateur.importance import Random
from secateur.planning import Budget, allocate, make_plan
from secateur.surgery import slice_model
from secateur.testing.graphs import allowed_miss
from secateur.testing.tiny import TINY

FAMILIES = [
    "llama-odd",
    "llama-mqa",
    "llama-tied",
    "qwen2",
    "phi3",
    "gpt2",
    "bloom",
    "falcon-new",
    "mixtral",
    "gpt-oss",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reachable_ratio_is_met_and_the_others_are_refused(family: str) -> None:
    model = TINY[family]()
    graph = trace(model)
    scores = Random().score(model, graph, None, seed=0)
    for ratio in (0.05, 0.2, 0.5, 0.8):
        try:
            removed = allocate(graph, scores, Budget(ratio=ratio))
        except PlanError as error:
            largest = re.search(r"at most (\d\.\d+)", str(error))
            assert largest
            assert float(largest[1]) < ratio
            continue
        plan = make_plan(graph, removed, Budget(ratio=ratio), method="random")
        assert abs(plan.parameters_after - (1 - ratio) * plan.parameters_before) <= allowed_miss(graph)
        plan.check(graph)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_parameters_planned_are_parameters_left(family: str) -> None:
    model = TINY[family]()
    graph = trace(model)
    removed = allocate(graph, Random().score(model, graph, None, seed=0), Budget(ratio=0.3))
    plan = make_plan(graph, removed, Budget(ratio=0.3), method="random")
    assert plan.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    slice_model(model, graph, plan.kept)
    assert plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3"])
def test_adapters_change_no_plan(family: str) -> None:
    model = TINY[family]()
    plain = trace(model)
    scores = Random().score(model, plain, None, seed=0)
    adapted = trace(get_peft_model(TINY[family](), LoraConfig(r=4, target_modules="all-linear")))
    budget = Budget(ratio=0.3)
    removed = allocate(plain, scores, budget)
    assert allocate(adapted, scores, budget) == removed
    one, other = (make_plan(graph, removed, budget, method="random") for graph in (plain, adapted))
    assert one == other

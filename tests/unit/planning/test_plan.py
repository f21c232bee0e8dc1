"""The plan that is written down, and the schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, allocate, by_period, cubic, decoder_ratio, describe_plan, make_plan
from secateur.testing.graphs import llama_graph
from secateur.types import PruningPlan, Scores

GRAPH = llama_graph([40] * 2, [2] * 2)
SCORES = Scores({group.name: torch.arange(group.size).float() + 1 for group in GRAPH})


def test_a_plan_counts_exactly_and_survives_the_disk(tmp_path: Path) -> None:
    budget = Budget(ratio=0.3)
    removed = allocate(GRAPH, SCORES, budget)
    plan = make_plan(GRAPH, removed, budget, method="magnitude", seed=7, base_model="somewhere", revision="main")
    plan.check(GRAPH)
    assert plan.parameters_after == GRAPH.parameter_count(plan.kept)
    assert plan.ratio_reached == 1 - plan.parameters_after / plan.parameters_before
    assert {name: plan.removed(name) for name in plan.kept} == removed
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(PlanError, match="not text in UTF-8"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_plan_fits_no_model_of_other_widths() -> None:
    same = llama_graph([40] * 2, [2] * 2)
    assert same.fingerprint == GRAPH.fingerprint
    plan = make_plan(GRAPH, {"layers.0.mlp": [0]}, Budget(), method="none")
    for other in (llama_graph([40] * 2, [2] * 2, hidden=96), llama_graph([40] * 2, [2] * 2, head_dim=6)):
        assert [(g.name, g.size) for g in other] == [(g.name, g.size) for g in GRAPH]
        with pytest.raises(PlanError, match="another model"):
            plan.check(other)


def test_a_plan_that_removes_nothing() -> None:
    plan = make_plan(GRAPH, {}, Budget(), method="none")
    assert plan.ratio_reached == 0
    assert plan.kept == {}


def test_a_plan_never_empties_a_group() -> None:
    with pytest.raises(PlanError, match="at least one"):
        make_plan(GRAPH, {"layers.0.attention": [0, 1]}, Budget(), method="none")


def test_the_text_has_both_ratios() -> None:
    removed = {"layers.0.mlp": list(range(30)), "layers.1.mlp": list(range(30))}
    plan = make_plan(GRAPH, removed, Budget(), method="magnitude")
    layers = sum(GRAPH.numel(name, {}) for name in GRAPH.shapes if "layers" in name)
    assert decoder_ratio(plan, GRAPH) == pytest.approx(60 * 3 * 48 / layers)
    text = describe_plan(plan, GRAPH)
    assert f"{plan.ratio_reached:.1%}" in text
    assert f"{decoder_ratio(plan, GRAPH):.1%}" in text
    assert "10 of 40" in text


def test_the_cubic_schedule() -> None:
    values = [cubic(step, 100) for step in range(100)]
    assert values[:11] == [0.0] * 11
    assert values[90:] == [1.0] * 10
    assert values == sorted(values)
    assert cubic(50, 100) == pytest.approx(1 - 0.5**3)
    assert cubic(0, 10, warm_up=0.0) == 0.0


def test_periods_are_equal() -> None:
    assert [by_period(period, 4) for period in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(ValueError, match="at least one"):
        by_period(0, 0)


@pytest.mark.parametrize("unit", ["true", '"0"', "0.0"])
def test_a_unit_is_a_whole_number_and_nothing_like_it(tmp_path: Path, unit: str) -> None:
    budget = Budget(ratio=0.3)
    plan = make_plan(GRAPH, allocate(GRAPH, SCORES, budget), budget, method="magnitude")
    name = next(iter(plan.kept))
    plan.model_copy(update={"kept": {name: [0]}}).save(tmp_path / "plan.json")
    text = "".join((tmp_path / "plan.json").read_text().split())
    (tmp_path / "plan.json").write_text(text.replace('"kept":{"' + name + '":[0]', '"kept":{"' + name + f'":[{unit}]'))
    with pytest.raises(PlanError, match=f"kept.*{name}"):
        PruningPlan.load(tmp_path / "plan.json")

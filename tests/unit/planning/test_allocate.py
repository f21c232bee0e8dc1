"""Allocation: exact landing, floors, legal shapes, nothing grows back, over many random graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, allocate, make_plan
from secateur.testing.graphs import allowed_miss, llama_graph
from secateur.types import Cut, DependencyGraph, Member, NodeGroup, Scores

RATIOS = (0.05, 0.2, 0.5, 0.8)
SEEDS = range(8)


def random_graph(seed: int) -> DependencyGraph:
    """A Llama of random shape, big enough in its layers for 80 %."""
    draw = Random(seed)
    layers = draw.randint(1, 6)
    equal = draw.random() < 0.5
    widths = [draw.randint(100, 300)] * layers if equal else [draw.randint(100, 300) for _ in range(layers)]
    heads = [draw.randint(2, 8)] * layers if equal else [draw.randint(2, 8) for _ in range(layers)]
    return llama_graph(widths, heads, queries=draw.randint(1, 4), hidden=draw.randint(8, 64), vocabulary=17, tied=True)


def random_scores(graph: DependencyGraph, seed: int, ties: bool = False) -> Scores:
    """Heavy-tailed scores on a scale of each group's own; with ``ties`` many are equal."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for group in graph:
        score = torch.randn(group.size, generator=generator).exp() * 10 ** float(torch.randn(1, generator=generator))
        values[group.name] = score.round() if ties else score
    return Scores(values)


def left(graph: DependencyGraph, removed: Mapping[str, list[int]]) -> int:
    return graph.parameter_count(Cut.removing(graph, removed))


def smallest_unit(graph: DependencyGraph) -> int:
    return min(graph.unit_cost(group) for group in graph.prunable)


@pytest.mark.parametrize("normalise", ["mean", "parameters", "none"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", SEEDS)
def test_global_ranking_lands_within_one_unit(seed: int, ratio: float, normalise: Any) -> None:
    graph = random_graph(seed)
    removed = allocate(graph, random_scores(graph, seed), Budget(ratio=ratio, normalise=normalise))
    assert abs(left(graph, removed) - (1 - ratio) * graph.parameter_count()) <= smallest_unit(graph)
    graph.check_kept(Cut.removing(graph, removed))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", SEEDS)
def test_layer_ranking_gives_equal_widths_within_one_step(seed: int, ratio: float) -> None:
    graph = random_graph(seed)
    removed = allocate(graph, random_scores(graph, seed), Budget(ratio=ratio, ranking="layer"))
    classes: dict[tuple[str, int], set[int]] = {}
    steps: dict[tuple[str, int], int] = {}
    for group in graph:
        key = (group.kind, group.size)
        classes.setdefault(key, set()).add(len(removed.get(group.name, ())))
        steps[key] = steps.get(key, 0) + graph.unit_cost(group)
    assert all(len(counts) == 1 for counts in classes.values())
    divisible = [step for (_, size), step in steps.items() if size > 1]
    assert abs(left(graph, removed) - (1 - ratio) * graph.parameter_count()) <= min(divisible)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_lowest_scores_of_each_group_go_and_ties_go_by_index(seed: int) -> None:
    graph = random_graph(seed)
    scores = random_scores(graph, seed, ties=True)
    removed = allocate(graph, scores, Budget(ratio=0.4))
    for name, units in removed.items():
        order = sorted(range(graph[name].size), key=lambda unit: (float(scores[name][unit]), unit))
        assert units == sorted(order[: len(units)])
    assert removed == allocate(graph, scores, Budget(ratio=0.4))


@pytest.mark.parametrize("budget", [Budget(ratio=0.6), Budget(ratio=0.6, ranking="layer")])
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_grows_back_on_the_way(seed: int, budget: Budget) -> None:
    graph = random_graph(seed)
    removed: dict[str, list[int]] = {}
    for period in range(1, 6):
        ratio = 0.6 * period / 5
        after = allocate(graph, random_scores(graph, 100 * seed + period), budget, removed, ratio)
        assert all(set(units) <= set(after[name]) for name, units in removed.items())
        if budget.ranking == "global":
            assert abs(left(graph, after) - (1 - ratio) * graph.parameter_count()) <= smallest_unit(graph)
        removed = after
    reached = 1 - left(graph, removed) / graph.parameter_count()
    assert reached == pytest.approx(0.6, abs=0.05)


def test_a_target_that_is_reached_already_removes_nothing_more() -> None:
    graph = llama_graph([40] * 2, [2] * 2)
    scores = random_scores(graph, 0)
    removed = allocate(graph, scores, Budget(ratio=0.4))
    assert allocate(graph, random_scores(graph, 1), Budget(ratio=0.4), removed) == removed
    assert allocate(graph, random_scores(graph, 1), Budget(ratio=0.4), removed, ratio=0.1) == removed


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_no_group_falls_below_its_floor(floor: float, ratio: float) -> None:
    graph = llama_graph([200] * 4, [4] * 4, vocabulary=17)
    drawn = torch.Generator().manual_seed(0)
    scores = Scores({g.name: torch.rand(g.size, generator=drawn) * (1e-6 if g.layer == 0 else 1) for g in graph})
    removed = allocate(graph, scores, Budget(ratio=ratio, floor=floor, normalise="none"))
    kept = {group.name: group.size - len(removed.get(group.name, ())) for group in graph}
    share = 1 - ratio * graph.parameter_count() / sum(graph.unit_cost(g) * g.size for g in graph)
    for group in graph:
        assert kept[group.name] >= max(1, int(floor * share * group.size * 0.8))
    if floor == 0:
        assert kept["layers.0.mlp"] == 1 or ratio < 0.5
    if floor == 1.0:
        widths = [count for name, count in kept.items() if name.endswith("mlp")]
        assert max(widths) - min(widths) <= 0.15 * 200  # heads are coarse: what they cannot take, channels do


@pytest.mark.parametrize("multiple", [8, 16])
def test_widths_are_rounded(multiple: int) -> None:
    graph = llama_graph([100, 128, 75], [4] * 3, vocabulary=17)
    for ratio in (0.1, 0.3, 0.5):
        removed = allocate(graph, random_scores(graph, 3), Budget(ratio=ratio, round_to={"ffn": multiple}))
        for group in graph:
            count = group.size - len(removed.get(group.name, ()))
            assert group.kind != "ffn" or count % multiple == 0 or count == group.size
        step = multiple * graph.unit_cost(graph["layers.0.mlp"])
        assert abs(left(graph, removed) - (1 - ratio) * graph.parameter_count()) <= step


def test_two_groups_on_one_parameter_are_counted_exactly() -> None:
    """Experts and the channels inside them share stacked tensors: what a unit costs depends on the other group."""
    experts, width, hidden = 6, 256, 24
    up, down, router = "layers.0.experts.up", "layers.0.experts.down", "layers.0.router.weight"
    shapes = {up: (experts, width, hidden), down: (experts, hidden, width), router: (experts, hidden)}

    def member(name: str, axis: int, role: Any) -> Member:
        return Member(name, axis, role, (0,), 1, 1)

    whole = NodeGroup(
        "layers.0.experts", "expert", experts, (member(up, 0, "out"), member(down, 0, "out"), member(router, 0, "out"))
    )
    inside = NodeGroup("layers.0.mlp", "ffn", width, (member(up, 1, "out"), member(down, 2, "in")))
    graph = DependencyGraph("moe", (whole, inside), shapes)
    for seed in SEEDS:
        for ratio in RATIOS:
            budget = Budget(ratio=ratio, kinds=("expert", "ffn"))
            removed = allocate(graph, random_scores(graph, seed), budget)
            assert abs(left(graph, removed) - (1 - ratio) * graph.parameter_count()) <= allowed_miss(graph)


def test_the_largest_ratio_that_an_error_names_can_be_reached() -> None:
    graph = llama_graph([40] * 2, [2] * 2)
    scores = random_scores(graph, 0)
    for keys in ({}, {"protect_first": 1}, {"kinds": ("ffn",)}, {"ranking": "layer"}, {"round_to": {"ffn": 8}}):
        with pytest.raises(PlanError, match="at most") as caught:
            allocate(graph, scores, Budget(ratio=0.9, **keys))
        found = re.search(r"at most ([\d.]+)\. Ask", str(caught.value)) or re.search(
            r"at most ([\d.]+)\.", str(caught.value)
        )
        assert found
        removed = allocate(graph, scores, Budget(ratio=float(found[1]), **keys))
        assert 1 - left(graph, removed) / graph.parameter_count() == pytest.approx(float(found[1]), abs=0.01)


def test_errors_say_which_knob_to_turn() -> None:
    graph = llama_graph([40] * 2, [2] * 2)
    with pytest.raises(PlanError, match=r"budget\.protect_first"):
        allocate(graph, random_scores(graph, 0), Budget(ratio=0.4, protect_first=1))
    with pytest.raises(PlanError, match="Nothing can be cut"):
        allocate(graph, random_scores(graph, 0), Budget(protect=("*",)))
    with pytest.raises(PlanError, match="score"):
        allocate(graph, Scores({}), Budget())
    with pytest.raises(PlanError, match="smallest step"):
        allocate(graph, random_scores(graph, 0), Budget(ratio=0.001, kinds=("attention",)))
    for name, units in (
        ("layers.0.mlp", [40]),
        ("layers.0.mlp", [-1]),
        ("layers.0.mlp", [1.5]),
        ("layers.0.mlp", range(40)),
        ("layers.7.mlp", []),
    ):
        with pytest.raises(PlanError, match="Already removed"):
            allocate(graph, random_scores(graph, 0), Budget(), removed={name: units})  # type: ignore[dict-item]


def test_protected_groups_stay_whole() -> None:
    graph = llama_graph([40] * 3, [2] * 3)
    protected = replace(
        graph, groups=tuple(replace(g, protected="a reason") if g.layer == 1 else g for g in graph.groups)
    )
    removed = allocate(protected, random_scores(graph, 0), Budget(ratio=0.3))
    assert not any(name.startswith("layers.1.") for name in removed)


def test_adapters_do_not_count() -> None:
    graph = llama_graph([40] * 2, [2] * 2)
    with_adapters = replace(graph, shapes={**graph.shapes, "model.layers.0.mlp.up_proj.lora_A.default.weight": (8, 48)})
    scores = random_scores(graph, 0)
    assert allocate(with_adapters, scores, Budget()) == allocate(graph, scores, Budget())
    plan = make_plan(with_adapters, allocate(graph, scores, Budget()), Budget(), method="random")
    assert plan.parameters_before == graph.parameter_count()

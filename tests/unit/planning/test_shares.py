"""Groups with a ratio of their own: both ratios are reached, or refused with a number."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from secateur.config import load_recipe
from secateur.errors import PlanError
from secateur.planning import Budget, Problem, allocate, restrict
from secateur.planning.shares import _shares
from secateur.surgery import checked_trace
from secateur.testing.graphs import llama_graph
from secateur.testing.tiny import TINY
from secateur.types import Cut, DependencyGraph, Scores

GRAPH = llama_graph([64] * 4, [4] * 4)


def scores(graph: DependencyGraph, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})


def own_ratio(graph: DependencyGraph, removed: dict[str, list[int]], names: list[str]) -> tuple[float, float]:
    """Which fraction of the parameters of these groups went, and which fraction one of their largest units is."""
    own = sum(graph.unit_cost(graph[name]) * graph[name].size for name in names)
    gone = sum(graph.unit_cost(graph[name]) * len(removed.get(name, ())) for name in names)
    return gone / own, max(graph.unit_cost(graph[name]) for name in names) / own


def names_of(kind: str) -> list[str]:
    return [group.name for group in GRAPH if group.kind == kind]


LAYER = ["layers.1.attention", "layers.1.mlp"]


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ({"attention": 0.25}, {"attention": names_of("attention")}),
        ({"layers.1.*": 0.05}, {"layers.1.*": LAYER}),
        ({"*.mlp": 0.3}, {"*.mlp": names_of("ffn")}),
        (
            {"layers.1.*": 0.4, "attention": 0.0},
            {"layers.1.*": LAYER, "attention": [name for name in names_of("attention") if name not in LAYER]},
        ),
    ],
)
def test_both_ratios_are_reached_within_a_unit(ranking: Any, shares: dict[str, float], named: Any) -> None:
    budget = Budget(ratio=0.2, ranking=ranking, shares=shares, floor=0.5)
    removed = allocate(GRAPH, scores(GRAPH), budget)
    GRAPH.check_kept(Cut.removing(GRAPH, removed))
    for pattern, names in named.items():
        ratio, unit = own_ratio(GRAPH, removed, names)
        step = unit * (len(names) if ranking == "layer" and pattern != "layers.1.*" else 1)
        assert abs(ratio - shares[pattern]) <= step
    reached = 1 - GRAPH.parameter_count(Cut.removing(GRAPH, removed)) / GRAPH.parameter_count()
    others = [group for group in GRAPH if not any(group.name in names for names in named.values())]
    smallest = min(GRAPH.unit_cost(group) for group in others)
    steps = smallest * (len(others) if ranking == "layer" else 1)
    assert abs(reached - 0.2) <= steps / GRAPH.parameter_count()


def test_parameters_that_two_groups_of_a_share_live_on_count_once() -> None:
    graph = checked_trace(TINY["llama-gqa"](), ("query",))  # query heads are parts of the KV heads beside them
    budget = Budget(ratio=0.2, shares={"layers.0.*": 0.1})
    [share] = _shares(Problem.of(restrict(graph, budget), scores(graph), budget))
    groups = [graph["layers.0.attention"], graph["layers.0.mlp"]]
    own = sum(graph.unit_cost(group) * group.size for group in groups)
    assert share.fraction == pytest.approx(own / graph.parameter_count())
    assert share.names == ("layers.0.attention", "layers.0.mlp")


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_shares_grow_along_with_the_whole(ranking: Any) -> None:
    budget = Budget(ratio=0.24, ranking=ranking, shares={"layers.1.*": 0.4, "attention": 0.1})
    removed: dict[str, list[int]] = {}
    for period in range(1, 5):
        ratio = None if period == 4 else budget.ratio * period / 4
        before, removed = removed, allocate(GRAPH, scores(GRAPH, period), budget, removed, ratio)
        assert all(set(units) <= set(removed[name]) for name, units in before.items())
    ratio, unit = own_ratio(GRAPH, removed, LAYER)
    assert abs(ratio - 0.4) <= unit
    reached = 1 - GRAPH.parameter_count(Cut.removing(GRAPH, removed)) / GRAPH.parameter_count()
    assert abs(reached - 0.24) <= 3 * GRAPH.unit_cost(GRAPH["layers.0.mlp"]) / GRAPH.parameter_count()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ratio": 0.1, "shares": {"ffn": 0.5}}, r"alone removes 0\.\d+ of all parameters, more than the 0.1"),
        ({"ratio": 0.5, "shares": {"ffn": 0.2, "attention": 0.1}}, r"names all prunable groups and removes 0\.\d+"),
        ({"ratio": 0.5, "shares": {"ffn": 0.1}}, r"A ratio of 0.5 .* at most 0\.\d+"),
        ({"ratio": 0.6, "shares": {"attention": 0.9}}, r"0.9 of the parameters of attention .* at most 0.75"),
        ({"shares": {"layer.0.*": 0.1}}, "'layer.0.*' names no group of its own"),
        ({"shares": {"ffn": 0.1, "layers.0.mlp": 0.2}}, "'layers.0.mlp' names no group of its own"),
        (
            {"shares": {"layers.0.*": 0.1}, "protect": ("layers.0.*",)},
            "no group of 'layers.0.*' can be cut: named",
        ),
        ({"shares": {"layers.0.*": 0.1}, "runs_on": "vllm"}, "vllm needs equal widths"),
    ],
)
def test_what_cannot_be_is_refused_with_the_number(keys: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        allocate(GRAPH, scores(GRAPH), Budget(**keys))
    found = re.search(r"takes (0\.\d+)", str(caught.value))
    if found and "alone" in message:  # and the number that it names can be had
        allocate(GRAPH, scores(GRAPH), Budget(**{**keys, "ratio": float(found[1])}))


def test_patterns_can_be_written_on_the_command_line() -> None:
    for text, shares in (
        ("{layers.0.*: 0.1, ffn: 0}", {"layers.0.*": 0.1, "ffn": 0.0}),
        ('{"*.mlp": 0.3}', {"*.mlp": 0.3}),
    ):
        assert load_recipe(None, [f"budget.shares={text}"]).budget.shares == shares


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_share_is_a_fraction(ratio: float) -> None:
    with pytest.raises(ValidationError):
        Budget(shares={"ffn": ratio})

"""The problem that a strategy is given: what it may keep, what that leaves, and which units then go."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, Problem, restrict, solve
from secateur.testing.graphs import llama_graph
from secateur.types import Cut, DependencyGraph, Scores


@pytest.fixture
def graph() -> DependencyGraph:
    return llama_graph([40, 40], [4, 4])


def rising(graph: DependencyGraph) -> Scores:
    """The first unit of each group is worth least."""
    return Scores({group.name: torch.arange(1.0, group.size + 1) for group in graph})


def problem_of(graph: DependencyGraph, removed: dict[str, list[int]] | None = None, **keys: object) -> Problem:
    budget = Budget(**keys)  # type: ignore[arg-type]
    return Problem.of(restrict(graph, budget), rising(graph), budget, removed)


def test_counts_become_the_units_with_the_lowest_scores(graph: DependencyGraph) -> None:
    problem = problem_of(graph, {"layers.0.mlp": [39]})
    counts = {"layers.0.mlp": 36, "layers.1.attention": 3}
    units = problem.choose(counts)
    assert units == {"layers.0.mlp": [0, 1, 2, 39], "layers.1.attention": [0]}
    assert problem.count(counts) == graph.parameter_count(Cut.removing(graph, units))
    assert problem.choose({}) == {"layers.0.mlp": [39]}


def test_a_strategy_needs_nothing_else(graph: DependencyGraph) -> None:
    """One of a few lines: channels go in turn, layer by layer, until the target is met."""
    problem = problem_of(graph, ratio=0.2, kinds=("ffn",), floor=0)
    counts = {name: stack.left for name, stack in problem.stacks.items()}
    while problem.count(counts) > problem.target():
        name = max(counts, key=lambda name: counts[name])
        counts[name] = max(count for count in problem.legal[name] if count < counts[name])
    units = problem.choose(counts)
    assert sum(map(len, units.values())) == sum(map(len, solve(problem).values())) > 0


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"layers.0.mlp": 0}, "cannot keep 0 of them.*: 8, 16"),
        ({"layers.0.mlp": 17}, "40 units left, and cannot keep 17.*: 16, 24"),
        ({"layers.0.mlp": 41}, "cannot keep 41"),
        ({"layers.0.attention": 2}, "layers.0.attention cannot be cut under this budget.*layers.0.mlp"),
        ({"layers.7.mlp": 2}, "layers.7.mlp cannot be cut"),
    ],
)
def test_illegal_counts_are_refused_with_the_nearest_legal_ones(
    graph: DependencyGraph, counts: dict[str, int], message: str
) -> None:
    problem = problem_of(graph, kinds=("ffn",), round_to={"ffn": 8})
    with pytest.raises(PlanError, match=message):
        problem.choose(counts)
    assert problem.choose({"layers.0.mlp": 16})["layers.0.mlp"] == list(range(24))


def test_on_the_way_counts_need_not_be_legal_yet_and_legal_ones_stay_within_reach(graph: DependencyGraph) -> None:
    problem = problem_of(graph, kinds=("ffn",), round_to={"ffn": 8})
    assert len(problem.choose({"layers.0.mlp": 17}, on_the_way=True)["layers.0.mlp"]) == 23
    with pytest.raises(PlanError, match="cannot keep 7"):
        problem.choose({"layers.0.mlp": 7}, on_the_way=True)


def test_a_part_counts_what_the_others_lost(graph: DependencyGraph) -> None:
    problem = problem_of(graph, ratio=0.2)
    gone = {"layers.0.attention": [0]}
    part = problem.part(["layers.0.mlp"], 0.1, gone)
    assert part.count({}) == graph.parameter_count(Cut.removing(graph, gone))
    assert set(part.choose({"layers.0.mlp": 30})) == {"layers.0.attention", "layers.0.mlp"}
    with pytest.raises(PlanError, match="cannot be cut"):
        part.choose({"layers.1.mlp": 30})

"""An order of removal: every smaller ratio is answered as by the cuts that made it, on graphs of uneven costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, Problem, allocate, by_period, extend, ranking, removed_before, restrict, solve
from secateur.planning.shapes import legal_counts
from secateur.testing.graphs import llama_graph
from secateur.types import Cut, DependencyGraph, Scores

CUTS = 8
REACH = 0.4


def uneven_graph(seed: int) -> DependencyGraph:
    """Layers of different widths; a KV head with its query heads costs about fifty times as much as a channel."""
    draw = torch.Generator().manual_seed(seed)
    widths = torch.randint(100, 300, (5,), generator=draw).tolist()
    heads = torch.randint(2, 9, (5,), generator=draw).tolist()
    return llama_graph(widths, heads, queries=3, hidden=48, vocabulary=17, tied=True)


def at_cut(graph: DependencyGraph, seed: int, number: int, removed: dict[str, list[int]], budget: Budget) -> Problem:
    """What cut ``number`` has to solve: every cut has random scores of its own."""
    draw = torch.Generator().manual_seed(1000 * seed + number)
    values = {group.name: torch.randn(group.size, generator=draw).exp() for group in graph}
    return Problem.of(restrict(graph, budget), Scores(values), budget, removed)


def in_cuts(graph: DependencyGraph, seed: int, cuts: int, ratio: float, **budget: Any) -> tuple[Any, Scores]:
    """The units that all cuts together remove, and their order."""
    chosen_budget = Budget(ratio=ratio, **budget)
    order: dict[str, torch.Tensor] = {}
    for number in range(cuts):
        problem = at_cut(graph, seed, number, removed_before(order, number), chosen_budget)
        chosen = solve(problem, None if number == cuts - 1 else by_period(number, cuts) * ratio)
        order = extend(order, problem, chosen, number)
        assert removed_before(order, number + 1) == {name: units for name, units in chosen.items() if units}
    return chosen, Scores(order, on_one_scale=True, reach=ratio)


def left(graph: DependencyGraph, removed: dict[str, list[int]]) -> int:
    return graph.parameter_count(Cut.removing(graph, removed))


@pytest.mark.parametrize("options", [{}, {"floor": 0.0}, {"round_to": {"ffn": 4}}, {"kinds": ("attention",)}])
@pytest.mark.parametrize("seed", range(5))
def test_the_end_of_every_cut_is_answered_exactly(seed: int, options: dict[str, Any]) -> None:
    graph = uneven_graph(seed)
    reach = 0.1 if "kinds" in options else REACH
    removed, order = in_cuts(graph, seed, CUTS, reach, **options)
    assert allocate(graph, order, Budget(ratio=reach, **options)) == removed
    for cuts in range(1, CUTS):
        ratio = reach * cuts / CUTS
        shorter, _ = in_cuts(graph, seed, cuts, ratio, **options)
        assert allocate(graph, order, Budget(ratio=ratio, **options)) == shorter
        assert all(set(units) <= set(removed[name]) for name, units in shorter.items())


@pytest.mark.parametrize("normalise", ["auto", "mean", "parameters"])
@pytest.mark.parametrize("seed", range(5))
def test_between_two_cuts_the_next_cut_has_begun(seed: int, normalise: Any) -> None:
    """The same as that cut would do alone, apart from what fills the place of a KV head that is too large."""
    graph = uneven_graph(seed)
    _, order = in_cuts(graph, seed, CUTS, REACH)
    costs = [graph.unit_cost(group) for group in graph.prunable]
    others = 0
    for step in range(1, 10 * CUTS):
        ratio, number = REACH * step / CUTS / 10, step // 10
        before = removed_before(order.values, number)
        removed = allocate(graph, order, Budget(ratio=ratio, normalise=normalise))
        alone = solve(at_cut(graph, seed, number, before, Budget(ratio=ratio)))
        assert all(set(units) <= set(removed[name]) for name, units in before.items())
        assert abs(left(graph, removed) - left(graph, alone)) <= min(costs)
        different = {(name, unit) for name, units in removed.items() for unit in units}
        different -= {(name, unit) for name, units in alone.items() for unit in units}
        assert len(different) * min(costs) <= max(costs)
        others += bool(different)
    assert others < 2 * CUTS


def test_the_place_of_a_unit_is_that_in_which_it_goes() -> None:
    graph, budget = uneven_graph(3), Budget(ratio=0.2)
    problem = at_cut(graph, 3, 0, {"layers.1.mlp": [4, 7]}, budget)
    places = ranking(problem)
    left = {name: sorted(set(range(len(units))) - problem.removed.get(name, set())) for name, units in places.items()}
    values = torch.cat([stack.scores[stack.order.argsort()] for stack in problem.stacks.values()])
    found = torch.cat([places[name][units] for name, units in left.items()])
    assert torch.equal(values.argsort(stable=True), found.argsort())
    assert found.sort().values.tolist() == list(range(sum(map(len, left.values()))))
    assert places["layers.1.mlp"][[4, 7]].tolist() == [0, 0]


def test_a_ratio_beyond_the_end_is_refused() -> None:
    graph = uneven_graph(0)
    _, order = in_cuts(graph, 0, 4, 0.2)
    with pytest.raises(PlanError, match=r"ends at a ratio of 0\.2, and 0\.25 is beyond"):
        allocate(graph, order, Budget(ratio=0.25))


def test_the_file_of_an_order_holds_all_of_it(tmp_path: Path) -> None:
    graph = uneven_graph(1)
    _, order = in_cuts(graph, 1, 5, 0.3)
    order.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.reach == order.reach
    assert all(torch.equal(again[name], order[name]) for name in order)
    assert allocate(graph, again, Budget(ratio=0.17)) == allocate(graph, order, Budget(ratio=0.17))


@pytest.mark.parametrize("seed", range(3))
def test_equal_widths_take_the_order_within_each_group(seed: int) -> None:
    graph = llama_graph([200] * 4, [8] * 4, vocabulary=17)
    removed, order = in_cuts(graph, seed, CUTS, REACH, ranking="layer")
    assert allocate(graph, order, Budget(ratio=REACH, ranking="layer")) == removed
    smaller = allocate(graph, order, Budget(ratio=REACH / 2, ranking="layer"))
    for name, units in smaller.items():
        assert units == sorted(order[name].argsort(stable=True)[: len(units)].tolist())
        assert len(units) == len(smaller[name.replace(name.split(".")[1], "0", 1)])


@pytest.mark.parametrize(
    ("runs_on", "ratio"), [("vllm", 0.1), ("vllm", 0.25), ("everywhere", 0.1), ("everywhere", 0.3)]
)
def test_small_cuts_end_with_widths_that_the_runtime_supports(runs_on: Any, ratio: float) -> None:
    """The widths before the last cut, between two legal ones, are nearer to the ratio."""
    graph = llama_graph([1536] * 6, [3] * 6, queries=3, head_dim=64, hidden=576, vocabulary=2000, tied=True)
    removed, _ = in_cuts(graph, 0, 24, ratio, runs_on=runs_on)
    for group in graph:
        assert group.size - len(removed.get(group.name, ())) in legal_counts(group, graph, runs_on, {})


@pytest.mark.parametrize(
    "options",
    [
        {"protect": ("layers.1.*",)},
        {"protect_last": 2},
        {"kinds": ("ffn",)},
        {"round_to": {"ffn": 16}},
        {"floor": 1.0},
        {"shares": {"attention": 0.05}},
        {"ranking": "layer"},
    ],
)
@pytest.mark.parametrize("ratio", [0.1, 0.13, 0.2])
def test_a_budget_is_obeyed_that_forbids_the_cuts_of_the_order(options: dict[str, Any], ratio: float) -> None:
    """At the ends of cuts, and between two."""
    graph = uneven_graph(2) if "ranking" not in options else llama_graph([200] * 4, [8] * 4, vocabulary=17)
    _, order = in_cuts(graph, 2, 4, 0.2)
    budget = Budget(ratio=ratio, **options)
    removed = allocate(graph, order, budget)
    problem = Problem.of(restrict(graph, budget), order, budget)
    assert removed.keys() <= problem.stacks.keys()
    kept = {name: graph[name].size - len(removed.get(name, ())) for name in problem.stacks}
    assert all(kept[name] in problem.legal[name] for name in kept)
    if "shares" in options:
        heads = {group.name: range(kept[group.name]) for group in graph if group.kind == "attention"}
        nothing = dict.fromkeys(heads, ())
        gone, whole = (graph.parameter_count() - graph.parameter_count(cut) for cut in (heads, nothing))
        assert gone / whole <= 0.05 + 1 / 15
    else:
        floors = problem.floors(problem.target())
        assert all(kept[name] >= floors[name] for name in kept)
    if "ranking" in options:
        assert len({(graph[name].kind, kept[name]) for name in kept}) == 2
    for name, units in removed.items():
        first = order[name].argsort(stable=True)[: len(units)].tolist()
        assert sorted(units) == sorted(first)

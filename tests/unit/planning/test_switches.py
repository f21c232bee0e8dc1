"""Level switches: every allocation that they reach is legal and has the same number of parameters."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from secateur.graph import trace
from secateur.planning import Budget, Levels, Problem, Switches, restrict, solve
from secateur.testing.graphs import llama_graph
from secateur.testing.tiny import build
from secateur.types import Cut, DependencyGraph, Scores


def uneven_graph(seed: int) -> DependencyGraph:
    draw = random.Random(seed)
    widths, heads = [draw.randint(100, 300) for _ in range(5)], [draw.randint(2, 8) for _ in range(5)]
    return llama_graph(widths, heads, queries=3, hidden=48, vocabulary=17, tied=True)


def even_graph(_: int) -> DependencyGraph:
    return llama_graph([256] * 5, [8] * 5, hidden=192, head_dim=12)


def problem_of(graph: DependencyGraph, seed: int, **budget: Any) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    chosen = Budget(**{"ratio": 0.3, **budget})
    restricted = restrict(graph, chosen)
    scores = {group.name: torch.randn(group.size, generator=draw).exp() for group in restricted}
    return Problem.of(restricted, Scores(scores), chosen)


def walked(switches: Switches, seed: int, generations: int = 40) -> list[Levels]:
    """Each one is a child of the one before."""
    draw, found = random.Random(seed), [switches.starts[0]]
    for _ in range(generations):
        found.append(switches.child(found[-1], draw, 3))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"floor": 0.0}, {"round_to": {"ffn": 8}}, {"kinds": ("attention",)}, {"kinds": ("ffn",)}, {"ratio": 0.05}],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_child_is_legal_and_of_the_right_size(seed: int, options: dict[str, Any]) -> None:
    problem = problem_of(uneven_graph(seed), seed, **{"ratio": 0.1, **options} if "kinds" in options else options)
    ranked = solve(problem)
    switches = Switches(problem, [ranked], 0.1)
    assert switches.removed(switches.starts[0]) == ranked
    start = problem.graph.parameter_count(Cut.removing(problem.graph, ranked))
    smallest = min(stack.parameters for stack in problem.stacks.values()) * options.get("round_to", {}).get("ffn", 1)
    found = walked(switches, seed)
    assert len(set(found)) > 10
    floors = problem.floors(problem.target())
    for levels in found:
        removed = switches.removed(levels)
        counts = {name: stack.left - len(removed.get(name, ())) for name, stack in problem.stacks.items()}
        assert problem.choose(counts) == removed, "legal, and by the order of the scores"
        assert all(counts[name] >= floors[name] for name in counts)
        size = problem.graph.parameter_count(Cut.removing(problem.graph, removed))
        assert size == switches.parameters(levels)
        assert abs(size - problem.target()) <= max(smallest, abs(start - problem.target()))


def test_heads_are_exchanged_for_channels() -> None:
    problem = problem_of(uneven_graph(0), 0, floor=0.0)
    switches = Switches(problem, [solve(problem)], 0.1)
    heads = {
        sum(len(units) for name, units in switches.removed(levels).items() if name.endswith("attention"))
        for levels in walked(switches, 0)
    }
    assert len(heads) > 2


def test_one_switch_takes_from_one_group_and_gives_to_one() -> None:
    problem = problem_of(uneven_graph(1), 1)
    switches = Switches(problem, [solve(problem)], 0.1)
    start = switches.starts[0]
    for seed in range(30):
        child = switches.child(start, random.Random(seed), 1)
        changes = sorted(after - before for before, after in zip(start, child, strict=True) if after != before)
        assert len(changes) == 2
        assert changes[0] < 0 < changes[1]


@pytest.mark.parametrize("options", [{"ranking": "layer"}, {"runs_on": "vllm"}])
def test_groups_of_equal_widths_move_together(options: dict[str, Any]) -> None:
    problem = problem_of(even_graph(0), 0, floor=0.3, **options)
    switches = Switches(problem, [solve(problem)], 0.1)
    assert len(switches.lots) == 2
    for levels in walked(switches, 0, 10):
        removed = switches.removed(levels)
        for kind in ("attention", "mlp"):
            assert len({len(removed.get(f"layers.{layer}.{kind}", ())) for layer in range(5)}) == 1
        counts = {name: stack.left - len(removed.get(name, ())) for name, stack in problem.stacks.items()}
        assert problem.choose(counts) == removed


def test_a_switch_stays_within_one_share() -> None:
    problem = problem_of(uneven_graph(2), 2, shares={"attention": 0.3})
    switches = Switches(problem, [solve(problem)], 0.1)
    cost = {name: stack.parameters for name, stack in problem.stacks.items()}
    spent = [
        sum(cost[name] * len(units) for name, units in switches.removed(levels).items() if "attention" in name)
        for levels in walked(switches, 2)
    ]
    assert len(set(spent)) == 1
    assert len(set(walked(switches, 2))) > 5


def test_an_uneven_cut_and_an_even_one_are_both_starts() -> None:
    problem = problem_of(even_graph(0), 3, floor=0.2)
    even = problem_of(even_graph(0), 3, floor=1.0)
    switches = Switches(problem, [solve(problem), solve(even), solve(problem)], 0.1)
    assert [switches.removed(levels) for levels in switches.starts] == [solve(problem), solve(even)]


def test_a_start_of_another_size_is_left_out() -> None:
    problem = problem_of(uneven_graph(0), 0)
    other = problem_of(uneven_graph(0), 0, ratio=0.2)
    assert len(Switches(problem, [solve(problem), solve(other)], 0.1).starts) == 1


def test_layers_are_exchanged_one_by_one_and_fixed_ones_stay() -> None:
    graph = trace(build("llama-odd"))
    problem = problem_of(graph, 0, ratio=0.2, kinds=("layer",), floor=0, protect=("layers.0.*",))
    switches = Switches(problem, [solve(problem)], 0.1)
    [name] = problem.stacks
    found = {tuple(switches.removed(levels)[name]) for levels in walked(switches, 0)}
    assert found == {(1,), (2,)}


def test_the_same_draw_gives_the_same_child() -> None:
    problem = problem_of(uneven_graph(0), 0)
    switches = Switches(problem, [solve(problem)], 0.1)
    assert walked(switches, 4) == walked(switches, 4)
    assert walked(switches, 4) != walked(switches, 5)


def test_another_order_changes_which_units_go_and_not_how_many() -> None:
    problem = problem_of(uneven_graph(0), 0, floor=0.0)
    switches = Switches(problem, [solve(problem)], 0.1)
    draw = random.Random(0)
    orders = {name: draw.sample(range(problem.graph[name].size), many) for name, many in switches.deepest.items()}
    other = switches.ordered(orders)
    assert other.starts == switches.starts
    for levels in walked(switches, 0):
        before, after = switches.removed(levels), other.removed(levels)
        assert {name: len(units) for name, units in before.items()} == {n: len(units) for n, units in after.items()}
        assert after == {name: sorted(orders[name][: len(units)]) for name, units in before.items()}
        assert other.parameters(levels) == switches.parameters(levels)
    assert walked(other, 0) == walked(switches, 0)
    for lot, deepest in zip(switches.lots, switches.deepest.values(), strict=True):
        problem.choose({name: problem.graph[name].size - deepest for name in lot.units})  # legal

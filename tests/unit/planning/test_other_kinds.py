"""Budgets that name experts or layers: legal numbers, units that stay, and exact counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, allocate, restrict
from secateur.planning.shapes import legal_counts
from secateur.testing.graphs import llama_graph
from secateur.types import Cut, DependencyGraph, Member, NodeGroup, Scores

LAYERS = 6
WIDTHS = (40, 40, 64, 40, 16, 40)


@pytest.fixture
def graph() -> DependencyGraph:
    """A llama with layers of different sizes, which may go as wholes."""
    plain = llama_graph(WIDTHS, [2] * LAYERS)
    paths = tuple(f"model.layers.{layer}" for layer in range(LAYERS))
    fixed = ((1, "layer 2 uses what it computes"),)
    layers = NodeGroup("layers", "layer", LAYERS, (), "protected by default: layer", None, (), True, 1, 1, fixed, paths)
    return replace(plain, groups=(*plain.groups, layers))


def scores(graph: DependencyGraph) -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
def test_layers_end_within_one_layer_of_the_target_and_are_counted_by_what_they_hold(
    graph: DependencyGraph, ratio: float
) -> None:
    removed = allocate(graph, scores(graph), Budget(ratio=ratio, kinds=("layer",), floor=0))
    assert set(removed) == {"layers"}
    assert 1 not in removed["layers"]
    kept = Cut.removing(graph, removed)
    graph.check_kept(kept)
    gone = sum(
        torch.Size(shape).numel()
        for name, shape in graph.shapes.items()
        if any(name.startswith(f"model.layers.{layer}.") for layer in removed["layers"])
    )
    assert graph.parameter_count() - graph.parameter_count(kept) == gone
    largest = max(
        graph.parameter_count() - graph.parameter_count({"layers": [n for n in range(6) if n != m]}) for m in range(6)
    )
    assert abs(gone - ratio * graph.parameter_count()) <= largest


def test_layers_and_channels_meet_the_target_together(graph: DependencyGraph) -> None:
    budget = Budget(ratio=0.4, kinds=("ffn", "attention", "layer"))
    kept = Cut.removing(graph, allocate(graph, scores(graph), budget))
    reached = 1 - graph.parameter_count(kept) / graph.parameter_count()
    assert reached == pytest.approx(0.4, abs=0.02)


def test_layers_that_the_budget_protects_stay(graph: DependencyGraph) -> None:
    budget = Budget(ratio=0.1, kinds=("layer",), protect_first=1, protect_last=2, protect=("layers.2.mlp",))
    assert restrict(graph, budget)["layers"].movable == [3]
    with pytest.raises(PlanError, match="cannot be reached"):
        allocate(graph, scores(graph), Budget(ratio=0.6, kinds=("layer",), protect_first=1, protect_last=2))


def test_a_kind_that_the_model_cannot_give_is_refused(graph: DependencyGraph) -> None:
    with pytest.raises(PlanError, match="names expert, and this llama model has no group"):
        restrict(graph, Budget(kinds=("ffn", "expert")))
    stuck = replace(graph, groups=tuple(replace(g, on_request=False) for g in graph))
    with pytest.raises(PlanError, match="names layer, which cannot be cut in this llama model: protected by default"):
        restrict(stuck, Budget(kinds=("layer",)))
    assert restrict(graph, Budget())["layers"].protected is not None


def test_experts_keep_what_the_router_needs_and_equal_runs() -> None:
    members = (Member("router.weight", 0, "out", (0,), 1, 1), Member("experts", 0, "out", (0,), 1, 1))
    experts = NodeGroup("layers.0.experts", "expert", 8, members, "by default", 0, ("top-k",), True, 4, 2)
    channels = NodeGroup("layers.0.mlp", "ffn", 64, (Member("experts", 1, "in", (0,), 1, 1),), None, 0)
    shapes = {"router.weight": (8, 16), "experts": (8, 64, 16), "rest": (400,)}
    graph = DependencyGraph("toy", (experts, channels), shapes)
    assert list(legal_counts(experts, graph, "transformers", {})) == [4, 6, 8]
    assert list(legal_counts(channels, graph, "transformers", {})) == list(range(8, 65, 8))
    removed = allocate(graph, Scores({experts.name: torch.arange(8.0)}), Budget(ratio=0.3, kinds=("expert",), floor=0))
    assert removed == {experts.name: [0, 4]} or removed == {experts.name: [0, 1, 4, 5]}
    graph.check_kept(Cut.removing(graph, removed))


def test_what_one_budget_refuses_another_does_not_open(graph: DependencyGraph) -> None:
    once = restrict(graph, Budget(kinds=("ffn",)))
    with pytest.raises(PlanError, match="cannot be cut"):
        restrict(once, Budget(kinds=("layer",)))

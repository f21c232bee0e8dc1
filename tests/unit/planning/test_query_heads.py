"""Budgets that name query heads: equally many from each KV head, whichever they are, and not together with KV heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from secateur.errors import PlanError
from secateur.planning import Budget, Problem, allocate, make_plan, ranking, restrict
from secateur.planning.shapes import legal_counts
from secateur.planning.stacks import build_stack
from secateur.testing.graphs import llama_graph
from secateur.types import Cut, DependencyGraph, NodeGroup, PruningPlan, Scores

LAYERS, KV_HEADS, QUERIES = 6, 3, 4


def with_query_heads(ffn: Sequence[int], kv_heads: Sequence[int], *, queries: int = 2, **shape: Any) -> DependencyGraph:
    """``llama_graph``, with the query heads within the KV heads of each layer, where there are several."""
    graph = llama_graph(ffn, kv_heads, queries=queries, **shape)
    groups: list[NodeGroup] = []
    for group in graph:
        groups.append(group)
        if group.kind == "attention" and queries > 1:
            members = [
                replace(member, stride=member.stride // queries, width=member.width // queries, run=queries)
                for member in group.members
                if ".q_proj." in member.parameter or ".o_proj." in member.parameter
            ]
            groups.append(
                NodeGroup(
                    name=f"{group.name}.query",
                    kind="query",
                    size=group.size * queries,
                    members=tuple(members),
                    protected="protected by default: query",
                    layer=group.layer,
                    on_request=True,
                    least=group.size,
                    runs=group.size,
                    within=group.name,
                )
            )
    return replace(graph, groups=tuple(groups))


@pytest.fixture
def graph() -> DependencyGraph:
    """Six layers of 3 KV heads with 4 query heads each, beside 40 channels."""
    return with_query_heads([40] * LAYERS, [KV_HEADS] * LAYERS, queries=QUERIES)


def scores(graph: DependencyGraph, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})


def per_head(units: Iterable[int]) -> list[int]:
    counts = [0] * KV_HEADS
    for unit in units:
        counts[unit // QUERIES] += 1
    return counts


def lost(graph: DependencyGraph, removed: dict[str, list[int]]) -> int:
    return graph.parameter_count() - graph.parameter_count(Cut.removing(graph, removed))


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("ratio", [0.08, 0.12, 0.2])
def test_every_kv_head_loses_as_many_and_the_target_is_met_within_a_step(
    graph: DependencyGraph, ratio: float, ranking: str
) -> None:
    budget = Budget(ratio=ratio, kinds=("query",), floor=0, ranking=ranking)  # type: ignore[arg-type]
    removed = allocate(graph, scores(graph), budget)
    assert {graph[name].kind for name in removed} == {"query"}
    for units in removed.values():
        assert len(set(per_head(units))) == 1
    step = graph.unit_cost(graph["layers.0.attention.query"]) * KV_HEADS * (LAYERS if ranking == "layer" else 1)
    assert abs(lost(graph, removed) - ratio * graph.parameter_count()) <= step
    if ranking == "layer":
        assert len({len(units) for units in removed.values()}) == 1


def test_a_ratio_below_one_step_says_what_a_step_is(graph: DependencyGraph) -> None:
    budget = Budget(ratio=0.005, kinds=("query",), floor=0)
    with pytest.raises(PlanError, match=r"one step is 0\.0233"):  # one query head of each KV head of a layer
        allocate(graph, scores(graph), budget)
    with pytest.raises(PlanError, match=r"one step is 0\.1399"):  # of all layers
        allocate(graph, scores(graph), budget.model_copy(update={"ranking": "layer"}))


def test_the_lowest_of_each_kv_head_go_whatever_their_places(graph: DependencyGraph) -> None:
    name = "layers.2.attention.query"
    marked = scores(graph)
    values = torch.ones(KV_HEADS * QUERIES)
    values[[1, 4, 10]] = torch.tensor([0.01, 0.02, 0.03])  # the second, first and third of their KV heads
    marked = Scores({**marked.values, name: values})
    budget = Budget(ratio=0.02, kinds=("query",), floor=0, protect=("layers.[01345].*",))
    assert allocate(graph, marked, budget) == {name: [1, 4, 10]}


def test_channels_and_query_heads_meet_the_target_together(graph: DependencyGraph) -> None:
    removed = allocate(graph, scores(graph), Budget(ratio=0.3, kinds=("ffn", "query")))
    assert {graph[name].kind for name in removed} == {"ffn", "query"}
    assert lost(graph, removed) / graph.parameter_count() == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_a_progressive_cut_is_legal_on_the_way(graph: DependencyGraph, ranking: str) -> None:
    budget = Budget(ratio=0.3, kinds=("query",), floor=0, ranking=ranking)  # type: ignore[arg-type]
    removed: dict[str, list[int]] = {}
    for step, ratio in enumerate([0.05, 0.1, 0.2, None]):
        before = removed
        removed = allocate(graph, scores(graph, seed=step), budget, removed=before, ratio=ratio)
        graph.check_kept(Cut.removing(graph, removed))
        assert all(set(units) <= set(removed[name]) for name, units in before.items())
    assert lost(graph, removed) / graph.parameter_count() == pytest.approx(0.3, abs=0.03)


def test_units_go_in_turns(graph: DependencyGraph) -> None:
    group = graph["layers.0.attention.query"]
    stack = build_stack(graph, group, Scores({group.name: torch.arange(12).float()}), (), "none")
    assert stack.order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    stack = build_stack(graph, group, Scores({group.name: -torch.arange(12).float()}), (0, 5, 9), "none")
    assert stack.order.tolist() == [3, 7, 11, 2, 6, 10, 1, 4, 8]


def test_counts_are_multiples_of_the_kv_heads_and_runtimes_have_their_say(graph: DependencyGraph) -> None:
    group = graph["layers.0.attention.query"]
    assert list(legal_counts(group, graph, "transformers", {})) == [3, 6, 9, 12]
    assert list(legal_counts(group, graph, "vllm", {})) == [3, 6, 12], "9 heads do not divide a hidden size of 48"
    assert list(legal_counts(group, graph, "transformers", {"query": 2})) == [6, 12]


def test_a_runtime_that_does_not_take_other_head_counts_keeps_them_whole() -> None:
    graph = with_query_heads([40] * 2, [2] * 2, model_type="qwen2")
    protected = restrict(graph, Budget(kinds=("ffn", "query"), runs_on="vllm"))["layers.0.attention.query"].protected
    assert protected == "qwen2 with other head counts does not open in vllm"


def test_kv_heads_and_query_heads_do_not_go_together(graph: DependencyGraph) -> None:
    with pytest.raises(ValidationError, match="name one of the two"):
        Budget(kinds=("attention", "query"))
    removed = {"layers.0.attention": [0], "layers.0.attention.query": [0, 4, 8]}
    with pytest.raises(PlanError, match="Cut one of the two"):
        make_plan(graph, removed, Budget(), method="by hand")


def test_only_one_of_the_two_is_open_under_a_budget(graph: DependencyGraph) -> None:
    def open_kinds(*kinds: str) -> set[str]:
        return {group.kind for group in restrict(graph, Budget(kinds=kinds)).prunable}  # type: ignore[arg-type]

    assert open_kinds("ffn", "attention") == {"ffn", "attention"}
    assert open_kinds("ffn", "query") == {"ffn", "query"}


def test_a_model_without_them_says_so() -> None:
    with pytest.raises(PlanError, match="no group of that kind"):
        restrict(with_query_heads([40], [2], queries=1), Budget(kinds=("query",)))


def test_the_plan_is_small_json_and_counts_what_goes(graph: DependencyGraph) -> None:
    budget = Budget(ratio=0.1, kinds=("query",), floor=0)
    plan = make_plan(graph, allocate(graph, scores(graph), budget), budget, method="random")
    again = PruningPlan.model_validate_json(plan.model_dump_json())
    again.check(graph)
    gone = sum(len(again.removed(name)) for name in again.kept)
    query: NodeGroup = graph["layers.0.attention.query"]
    assert again.parameters_before - again.parameters_after == gone * graph.unit_cost(query) == gone * 2 * 12 * 48


def test_in_the_ranking_a_head_waits_for_those_that_go_before_it(graph: DependencyGraph) -> None:
    budget = Budget(ratio=0.05, kinds=("query", "ffn"))
    problem = Problem.of(restrict(graph, budget), scores(graph), budget)
    for name, places in ranking(problem).items():
        assert (places[problem.stacks[name].order].diff() > 0).all()

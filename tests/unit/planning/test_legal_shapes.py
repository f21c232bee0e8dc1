"""Shapes that other runtimes open: equal widths, multiples, head counts; or a refusal with the nearest ratio."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from secateur.errors import PlanError
from secateur.planning import Budget, allocate
from secateur.planning.shapes import ffn_step, legal_counts
from secateur.testing.graphs import llama_graph
from secateur.types import Cut, DependencyGraph, Scores

SMOLLM2 = llama_graph([1536] * 30, [3] * 30, queries=3, head_dim=64, hidden=576, vocabulary=49152, tied=True)


def scores_of(graph: DependencyGraph) -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})


@pytest.mark.parametrize(
    ("size", "multiple", "step"), [(11008, 256, 256), (1024, 256, 256), (1023, 256, 128), (40, 256, 8), (3, 64, 1)]
)
def test_the_step_leaves_at_least_four_widths(size: int, multiple: int, step: int) -> None:
    assert ffn_step(size, multiple) == step


@pytest.mark.parametrize(("runs_on", "multiple"), [("vllm", 64), ("llama.cpp", 256), ("everywhere", 256)])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.33, 0.5])
def test_widths_are_equal_and_legal_or_the_nearest_is_named(runs_on: Any, multiple: int, ratio: float) -> None:
    def cut(ratio: float) -> None:
        removed = allocate(SMOLLM2, scores_of(SMOLLM2), Budget(ratio=ratio, runs_on=runs_on))
        for kind in ("ffn", "attention"):
            counts = {g.size - len(removed.get(g.name, ())) for g in SMOLLM2 if g.kind == kind}
            assert len(counts) == 1
            assert kind != "ffn" or counts.pop() % multiple == 0
        after = SMOLLM2.parameter_count(Cut.removing(SMOLLM2, removed))
        assert 1 - after / SMOLLM2.parameter_count() == pytest.approx(ratio, abs=0.02)

    try:
        cut(ratio)
    except PlanError as error:
        for nearest in re.findall(r"0\.\d{4}", str(error)):
            cut(float(nearest))


def test_a_refusal_names_the_nearest_ratios() -> None:
    graph = llama_graph([64] * 2, [1] * 2, vocabulary=17)
    with pytest.raises(PlanError, match=r"The nearest: 0\.\d+ and 0\.\d+\.") as caught:
        allocate(graph, scores_of(graph), Budget(ratio=0.25, runs_on="llama.cpp"))
    below, above = (float(text) for text in re.findall(r"0\.\d{4}", str(caught.value)))
    assert below < 0.25 < above


def test_head_counts_divide_the_hidden_width_where_the_family_demands_it() -> None:
    llama = llama_graph([64], [8], queries=1, head_dim=8, hidden=64)
    mistral = llama_graph([64], [8], queries=1, head_dim=8, hidden=64, model_type="mistral")
    attention = "layers.0.attention"
    assert list(legal_counts(llama[attention], llama, "everywhere", {})) == [1, 2, 4, 8]
    assert list(legal_counts(mistral[attention], mistral, "everywhere", {})) == list(range(1, 9))
    assert list(legal_counts(llama[attention], llama, "transformers", {})) == list(range(1, 9))


def test_the_way_is_free_but_the_end_is_legal() -> None:
    budget = Budget(ratio=0.2, runs_on="everywhere")
    removed: dict[str, list[int]] = {}
    for period in range(1, 6):
        generator = torch.Generator().manual_seed(period)
        scores = Scores({group.name: torch.rand(group.size, generator=generator) for group in SMOLLM2})
        after = allocate(SMOLLM2, scores, budget, removed, ratio=None if period == 5 else 0.2 * period / 5)
        assert all(set(units) <= set(after[name]) for name, units in removed.items())
        reached = 1 - SMOLLM2.parameter_count(Cut.removing(SMOLLM2, after)) / SMOLLM2.parameter_count()
        assert reached == pytest.approx(0.2 * period / 5, abs=0.02)
        removed = after
    assert {len(units) % 256 for name, units in removed.items() if name.endswith("mlp")} <= {0}

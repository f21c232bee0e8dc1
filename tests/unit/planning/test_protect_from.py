"""What an analysis keeps whole under different budgets; its numbers here are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.analysis import Analysis, Trial
from secateur.errors import PlanError
from secateur.planning import Budget, allocate, restrict
from secateur.surgery import checked_trace
from secateur.testing.tiny import TINY
from secateur.types import DependencyGraph, Scores


@pytest.fixture(scope="module")
def graph() -> DependencyGraph:
    return checked_trace(TINY["llama-gqa"](), ("query",))


def _analysis(graph: DependencyGraph, folder: Path, **kl: float) -> Path:
    """Of the groups ``kl`` names (``l1_mlp``), by their KL."""
    trials = []
    for short, value in kl.items():
        group = graph["layers." + short.removeprefix("l").replace("_", ".")]
        facts: dict[str, Any] = {"group": group.name, "kind": group.kind, "layer": group.layer, "units": group.size}
        trials.append(Trial(**facts, ratio=0.5, removed=group.size // 2, loss=1.0, kl=value))
    analysis = Analysis(
        fingerprint=graph.fingerprint, criterion="taylor", text=[], tokens=8, window=4, dense_loss=1.0, trials=trials
    )
    analysis.save(folder / "analysis.json")
    return folder / "analysis.json"


def _whole(graph: DependencyGraph, budget: Budget) -> list[str]:
    """Groups that stay whole because of the analysis."""
    return [group.name for group in restrict(graph, budget) if "most sensitive" in (group.protected or "")]


def test_what_holds_for_kv_heads_holds_for_the_query_heads_in_them(graph: DependencyGraph, tmp_path: Path) -> None:
    file = _analysis(graph, tmp_path, l0_attention=0.9, l0_mlp=0.1, l1_attention=0.2, l1_mlp=0.1)
    budget = Budget(kinds=("query",), protect_from=file, protect_share=0.25)
    cut = restrict(graph, budget)
    assert [group.name for group in cut.prunable] == ["layers.1.attention.query"]
    assert "most sensitive 25%" in (cut["layers.0.attention.query"].protected or "")


def test_what_holds_for_query_heads_holds_for_the_kv_heads_they_go_with(graph: DependencyGraph, tmp_path: Path) -> None:
    file = _analysis(graph, tmp_path, l0_attention_query=0.9, l1_mlp=0.1)
    assert "layers.0.attention" in _whole(graph, Budget(protect_from=file, protect_share=0.5))


def test_a_layer_with_a_sensitive_group_does_not_go(graph: DependencyGraph, tmp_path: Path) -> None:
    file = _analysis(graph, tmp_path, l0_mlp=0.1, l1_mlp=0.9)
    budget = Budget(kinds=("layer",), protect_from=file, protect_share=0.5)
    [layers] = restrict(graph, budget).prunable
    assert layers.movable == [0]
    assert "most sensitive" in dict(layers.fixed)[1]


def test_an_analysis_that_says_nothing_about_what_is_cut_is_refused(graph: DependencyGraph, tmp_path: Path) -> None:
    file = _analysis(graph, tmp_path, l0_attention=0.9, l0_mlp=0.1, l1_attention=0.2, l1_mlp=0.1)
    with pytest.raises(PlanError, match=r"protects nothing: this budget cuts ffn.*layers.0.attention.*protect_share"):
        restrict(graph, Budget(kinds=("ffn",), protect_from=file, protect_share=0.5))
    budget = Budget(kinds=("ffn",), protect_from=file, protect_share=0.75)
    assert restrict(restrict(graph, budget), budget) == restrict(graph, budget)


def test_a_small_share_of_few_groups_is_one_group(graph: DependencyGraph, tmp_path: Path) -> None:
    file = _analysis(graph, tmp_path, l0_attention=0.2, l0_mlp=0.1, l1_attention=0.9, l1_mlp=0.1)
    budget = Budget(protect_from=file, protect_share=0.1)
    assert [group.name for group in restrict(graph, budget).prunable if group.kind == "attention"] == [
        "layers.0.attention"
    ]


def test_when_all_is_protected_the_reason_is_given_once_with_the_way_out(
    graph: DependencyGraph, tmp_path: Path
) -> None:
    file = _analysis(graph, tmp_path, l0_attention=0.9, l0_mlp=0.1, l1_attention=0.2, l1_mlp=0.1)
    with pytest.raises(PlanError, match=r"Nothing can be cut.*Lower budget\.protect_share") as caught:
        allocate(graph, Scores({}), Budget(protect_from=file, protect_share=0.9))
    assert str(caught.value).count("most sensitive 90%") == 1

"""What a budget accepts, and what it keeps out of reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from secateur.errors import PlanError
from secateur.planning import Budget, restrict
from secateur.testing.graphs import llama_graph


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.2, math.nan, math.inf, "half", None, True])
def test_ratio_lies_strictly_between_0_and_1(ratio: Any) -> None:
    with pytest.raises(ValidationError, match="strictly between 0 and 1"):
        Budget(ratio=ratio)


def test_a_ratio_may_be_text() -> None:
    assert Budget.model_validate({"ratio": "0.35"}).ratio == 0.35


@pytest.mark.parametrize(
    "keys",
    [
        {"ratoi": 0.2},
        {"floor": 1.5},
        {"kinds": []},
        {"kinds": ["heads"]},
        {"runs_on": "tgi"},
        {"round_to": {"ffn": 0}},
        {"protect_first": -1},
        {"protect_last": 1.5},
        {"runs_on": "vllm", "protect_first": 1},
        {"runs_on": "everywhere", "protect_last": 1},
    ],
)
def test_wrong_keys_and_values_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(keys)


def test_restrict_protects_what_is_out_of_reach_and_says_why() -> None:
    graph = llama_graph([40] * 4, [2] * 4)
    budget = Budget(protect=("layers.1.*",), protect_first=1, protect_last=1, kinds=("ffn",))
    restricted = restrict(graph, budget)
    assert [group.name for group in restricted.prunable] == ["layers.2.mlp"]
    assert "protect_first" in str(restricted["layers.0.mlp"].protected)
    assert "budget.protect" in str(restricted["layers.1.mlp"].protected)
    assert "protect_last" in str(restricted["layers.3.mlp"].protected)
    assert "kinds" in str(restricted["layers.2.attention"].protected)
    assert restricted.fingerprint == graph.fingerprint
    assert restrict(restricted, budget) == restricted


def test_a_pattern_that_protects_nothing_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"layer\.0.*layers\.0\.attention"):
        restrict(llama_graph([40] * 2, [2] * 2), Budget(protect=("layer.0.*",)))


def test_one_protected_layer_stops_its_whole_kind_where_widths_must_be_equal() -> None:
    graph = llama_graph([40] * 3, [2] * 3)
    names = [g.name for g in restrict(graph, Budget(protect=("layers.1.mlp",), runs_on="vllm")).prunable]
    assert names == ["layers.0.attention", "layers.1.attention", "layers.2.attention"]


@pytest.mark.parametrize(
    ("model_type", "runs_on", "heads"),
    [
        ("qwen2", "vllm", False),
        ("qwen2", "transformers", True),
        ("qwen3", "everywhere", True),
        ("phi3", "vllm", True),
        ("phi3", "llama.cpp", False),
        ("gpt2", "everywhere", False),
    ],
)
def test_heads_are_cut_only_where_the_runtime_opens_the_family(model_type: str, runs_on: Any, heads: bool) -> None:
    graph = restrict(llama_graph([40] * 2, [2] * 2, model_type=model_type), Budget(runs_on=runs_on))
    assert any(group.kind == "attention" for group in graph.prunable) == heads


def test_a_share_of_the_layers_can_be_kept_whole() -> None:
    graph = restrict(llama_graph([40] * 10, [2] * 10), Budget(protect_first=0.2, protect_last=0.04))
    whole = {group.layer for group in graph if group.protected is not None and group.layer is not None}
    assert whole == {0, 1}

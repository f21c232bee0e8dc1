"""Pruning in several rounds: the plan counts dense units, the last ratio is exact, and a kill changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import pipeline
from secateur.compare import compare
from secateur.config import Recipe, load_recipe, revise
from secateur.errors import InputError
from secateur.graph import trace
from secateur.planning import Budget
from secateur.recovery import RecoverySettings
from secateur.stages import STAGES, order
from secateur.stages.position import Position
from secateur.surgery import masked, slice_model
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.types import Cut

TEXT = {"text": "letters.txt", "window": 16}
TREE = {
    "model": {"name": "tiny"},
    "budget": {"ratio": 0.4, "rounds": 2},
    "calibration": {**TEXT, "tokens": 160},
    "recovery": {**TEXT, "tokens": 256, "steps": 6, "between": 0.34, "repair_tokens": 160},
    "evaluation": {**TEXT, "tokens": 96, "speed": False},
    "training": {"precision": "fp32"},
    "export": {"verify_tokens": 16},
}
IDS = torch.arange(1, 40).view(3, 13)


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def recipe(**flags: Any) -> Recipe:
    return revise(load_recipe(flags=TREE), flags)


def weightless(spec: str, rounds: int = 2, method: str = "magnitude", **flags: Any) -> tuple[Any, Any]:
    """A model before, and the result of rounds that change no weights."""
    asked = {"budget": {"ratio": 0.4, "rounds": rounds, **flags}, "recovery": {"steps": 0, "repair": False}}
    return build(spec), secateur.prune(build(spec), method=method, recipe={**asked, "evaluation": {"speed": False}})


@pytest.mark.parametrize(
    ("spec", "rounds", "flags"),
    [
        ("llama-gqa", 2, {}),
        ("llama-gqa", 9, {"floor": 0.0}),
        ("llama-odd", 3, {"ranking": "layer"}),
        ("llama-odd", 2, {"kinds": ["ffn", "query"], "shares": {"query": 0.1}}),
        ("llama-mqa", 2, {"protect": ["layers.1.*"], "ratio": 0.2}),
        ("qwen2", 3, {}),
        ("mixtral", 2, {}),
        ("phi3", 2, {}),
    ],
)
def test_the_plan_of_all_rounds_cuts_the_dense_model_to_the_same(
    spec: str, rounds: int, flags: dict[str, Any]
) -> None:
    dense, result = weightless(spec, rounds, **flags)
    ratio = flags.get("ratio", 0.4)
    unit = max(result.graph.unit_cost(group) for group in result.graph.prunable if group.name in result.plan.kept)
    removed = result.plan.parameters_before - result.plan.parameters_after
    assert abs(removed - ratio * result.plan.parameters_before) <= unit
    kept = Cut.keeping(result.graph, result.plan.kept)
    with torch.no_grad(), masked(dense, result.graph, kept):
        expected = dense.eval()(input_ids=IDS).logits
    again = secateur.apply_plan(result.plan, build(spec))
    found = result.model.state_dict()
    assert found.keys() == again.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(found[name], value), name
    with torch.no_grad():
        logits = result.model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)
    assert result.scores is None

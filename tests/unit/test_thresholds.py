"""The far side of thresholds: what a large model or text takes another way for comes to the same numbers.

Those of stand-ins are in ``surgery/test_stand_in.py``; those of one file's subject (logits in chunks, blocks of a
gradient's elements, pieces of a text) are tested beside it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from secateur import digest, token_loss
from secateur.cli import app
from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.importance import CRITERIA, knowledge
from secateur.planning import Budget, allocate, equal
from secateur.surgery import masked, unrouted
from secateur.testing.contracts import logits
from secateur.testing.graphs import llama_graph
from secateur.testing.tiny import TINY, VOCAB, build
from secateur.types import Cut, Scores
from secateur.walk import Calibration

VERIFY = importlib.import_module("secateur.surgery.verify")
IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", [1, 5, 11])
def test_losses_of_an_analysis_by_chunks_of_positions(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    model = TINY["llama-gqa"]()
    graph, blocks = trace(model), Calibration(TokenBlocks(IDS, ("noise",) * 4))
    cuts = knowledge.cuts(graph, CRITERIA["magnitude"]().score(model, graph, None, 0), (0.5,))
    dense, whole = knowledge.measure_cuts(model, graph, blocks, cuts)
    monkeypatch.setattr(token_loss, "_READ", positions * len(IDS) * VOCAB)
    again, parts = knowledge.measure_cuts(model, graph, blocks, cuts)
    assert again == pytest.approx(dense, rel=1e-6)
    for one, two in zip(whole, parts, strict=True):
        assert (two.loss, two.kl) == pytest.approx((one.loss, one.kl), rel=1e-5)


def test_a_digest_of_some_weights_still_tells_models_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_WEIGHTS_OF_A_PARAMETER", 7)
    model = TINY["llama-gqa"]()
    before = digest.digest(model)
    assert digest.digest(model.to(torch.bfloat16)) == before
    assert digest.digest(TINY["llama-gqa"]()) == before
    assert digest.digest(build("llama-gqa", seed=1)) != before
    for name, _ in model.named_parameters():
        other: Any = TINY["llama-gqa"]()
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)  # as after training: of every parameter that changed, all weights did
        assert digest.digest(other) != before, name


@pytest.mark.parametrize("half", [False, True])
def test_routers_that_ran_more_often_than_is_remembered(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    monkeypatch.setattr(unrouted, "_DERIVED", 2)
    model = TINY["qwen3-moe"]()
    graph = trace(model).opened(["expert"])
    kept = {group.name: list(range(3)) for group in graph.prunable if group.kind == "expert"}
    assert kept
    with masked(model, graph, kept), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        answers = [logits(model) for _ in range(6)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert not torch.equal(answers[0], logits(model))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_equal_widths_when_not_all_combinations_are_tried(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    graph = llama_graph([120] * 2 + [90] * 2 + [64] * 2, [4] * 2 + [8] * 4, hidden=48)
    generator = torch.Generator().manual_seed(0)
    scores = Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})
    budget = Budget(ratio=ratio, ranking="layer")
    target, steps = (1 - ratio) * graph.parameter_count(), dict[tuple[str, int], int]()
    for group in graph:
        steps[group.kind, group.size] = steps.get((group.kind, group.size), 0) + graph.unit_cost(group)
    for combinations in (256, 4):
        monkeypatch.setattr(equal, "_COMBINATIONS", combinations)
        left = graph.parameter_count(Cut.removing(graph, allocate(graph, scores, budget)))
        assert abs(left - target) <= min(steps.values())


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_equal_widths_when_the_class_with_most_widths_is_a_small_one(ratio: float) -> None:
    """As in DeepSeek-V3: three dense layers of 18432 channels, and many of 2048."""
    graph = llama_graph([300] + [256] * 60, [1] * 61, hidden=48)
    generator = torch.Generator().manual_seed(0)
    scores = Scores({group.name: torch.rand(group.size, generator=generator) for group in graph})
    removed = allocate(graph, scores, Budget(ratio=ratio, ranking="layer"))
    left = graph.parameter_count(Cut.removing(graph, removed))
    channel = sum(graph.unit_cost(group) for group in graph if group.kind == "ffn" and group.size == 256)
    assert abs(left - (1 - ratio) * graph.parameter_count()) <= channel / 2


def test_inspect_of_a_model_that_is_too_large_to_be_checked_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build("llama-gqa").save_pretrained(tmp_path)
    found = []
    for largest in (300_000_000, 0):
        monkeypatch.setattr(VERIFY, "WHOLE_UP_TO", largest)
        result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--verify"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert ("on random weights" in result.stdout) == (largest == 0)
        found.append(result.stdout.count("slice = mask"))
    assert found == [6, 6]  # two layers, all groups and some

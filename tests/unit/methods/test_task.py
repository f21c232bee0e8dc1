"""What a task offers to every method: the groups that its budget may cut, found once, and the choice among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.analysis import Analysis, Trial
from secateur.methods import METHODS
from secateur.planning import Problem, allocate
from secateur.testing.method_contract import MethodContract
from secateur.types import Scores

MANY_CHOICES: dict[str, dict[str, Any]] = {
    "loraprune": {"steps": 4},
    "lorashear": {"periods": 2, "period_steps": 1, "warmup_steps": 1, "saliency": {"lora": 1.0, "taylor": 1.0}},
    "llm-pruner": {"rounds": 3},
    "flap": {},
}


def task_of(method: str, **budget: Any) -> Any:
    class Case(MethodContract):
        pass

    Case.method = METHODS[method]
    return Case().task(0.1, **budget)


@pytest.fixture
def analysis(tmp_path: Path) -> Path:
    graph = task_of("random").graph
    sensitive, other = graph["layers.0.mlp"], graph["layers.1.mlp"]
    trials = [
        Trial(group=g.name, kind=g.kind, layer=g.layer, ratio=0.5, units=g.size, removed=g.size // 2, loss=1.0, kl=kl)
        for g, kl in ((sensitive, 0.9), (other, 0.1))
    ]
    facts: dict[str, Any] = {"criterion": "taylor", "text": [], "tokens": 8, "window": 4, "dense_loss": 1.0}
    Analysis(fingerprint=graph.fingerprint, trials=trials, **facts).save(tmp_path / "analysis.json")
    return tmp_path / "analysis.json"


@pytest.mark.parametrize("name", MANY_CHOICES)
def test_an_analysis_is_read_once_however_often_a_method_chooses(
    name: str, analysis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, choices = [], []
    load, choose = Analysis.load, Problem.choose
    monkeypatch.setattr(Analysis, "load", lambda path: reads.append(path) or load(path))
    monkeypatch.setattr(Problem, "choose", lambda *a, **k: choices.append(0) or choose(*a, **k))
    task = task_of(name, protect_from=analysis, protect_share=0.5)
    method = METHODS[name](METHODS[name].Settings(**MANY_CHOICES[name]))
    method.check(task)
    removed = method.run(task).removed
    assert reads == [analysis]
    assert len(choices) >= (1 if name == "flap" else 2)
    assert removed
    assert "layers.0.mlp" not in removed


def test_it_chooses_as_its_budget_says() -> None:
    task = task_of("random", kinds=("ffn",), protect=("layers.0.*",))
    assert [group.name for group in task.prunable] == ["layers.1.mlp"]
    scores = Scores({"layers.1.mlp": torch.rand(task.graph["layers.1.mlp"].size)})
    half = task.allocate(scores, ratio=0.05)
    assert half == allocate(task.graph, scores, task.budget, ratio=0.05)
    assert task.allocate(scores, half) == allocate(task.graph, scores, task.budget, half)


@pytest.mark.parametrize("scale", [{}, {"of_loss": True}, {"on_one_scale": True}])
def test_scores_survive_their_file_with_their_scale(scale: dict[str, bool], tmp_path: Path) -> None:
    scores = Scores({"a": torch.rand(4), "b": torch.rand(2)}, **scale)
    scores.save(tmp_path / "scores.safetensors")
    found = Scores.load(tmp_path / "scores.safetensors")
    assert (found.of_loss, found.on_one_scale) == (scores.of_loss, scores.on_one_scale)
    assert all(torch.equal(found[name], scores[name]) for name in scores)

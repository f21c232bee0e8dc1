"""GISP: the contract, nested answers for every smaller ratio, and the right text and model for each cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import importance
from secateur.errors import InputError
from secateur.graph import trace
from secateur.methods import METHODS, Decision, PruningTask
from secateur.methods.gisp import GISP, Cuts, GISPSettings
from secateur.planning import Budget, allocate, removed_before
from secateur.surgery import slice_model
from secateur.testing.method_contract import MethodContract, noise
from secateur.types import Cut, Scores
from secateur.walk import Calibration

SETTINGS = GISPSettings(cuts=4, windows=2)


class TestGISP(MethodContract):
    method = GISP
    settings = SETTINGS


class TestGISPByTaylorOnAverage(MethodContract):
    method = GISP
    settings = GISPSettings(cuts=3, windows=None, moving_average=0.5, saliency={"taylor": 1.0, "random": 0.1})


class TestGISPOfAMixture(MethodContract):
    method = GISP
    settings = SETTINGS
    family = "mixtral"

    def test_the_budget_is_obeyed(self) -> None:
        task = self.task(0.1, protect=("layers.0.*",), kinds=("ffn",))
        assert set(self.decide(task).removed) == {"layers.1.mlp.experts"}


class TestGISPUnderANormOverHeads(MethodContract):
    method = GISP
    settings = SETTINGS
    family = "olmo2"


def run(ratio: float, cuts: int, **changes: Any) -> tuple[PruningTask, Decision]:
    task = TestGISP().task(ratio, **changes)
    return task, GISP(SETTINGS.model_copy(update={"cuts": cuts})).run(task)


def is_within(one: dict[str, list[int]], other: dict[str, list[int]]) -> bool:
    return all(set(units) <= set(other.get(name, ())) for name, units in one.items())


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_a_smaller_ratio_from_the_scores_is_what_a_run_to_it_removes(floor: float, tmp_path: Path) -> None:
    task, decision = run(0.4, 8, floor=floor)
    assert decision.scores is not None
    decision.scores.save(tmp_path / "scores.safetensors")
    scores = Scores.load(tmp_path / "scores.safetensors")
    assert scores.reach == 0.4
    larger = decision.removed
    for cuts in range(8, 0, -1):
        ratio = 0.4 * cuts / 8
        removed = allocate(task.graph, scores, Budget(ratio=ratio, floor=floor))
        assert removed == run(ratio, cuts, floor=floor)[1].removed
        assert is_within(removed, larger)
        larger = removed
    assert {task.graph[name].kind for name in decision.removed} == {"ffn", "attention"}


def test_equal_widths_go_in_the_same_order() -> None:
    task, decision = run(0.4, 4, ranking="layer")
    assert decision.scores is not None
    assert allocate(task.graph, decision.scores, task.budget) == decision.removed
    smaller = allocate(task.graph, decision.scores, Budget(ratio=0.15, ranking="layer"))
    for kind in ("ffn", "attention"):
        assert len({len(smaller.get(group.name, ())) for group in task.graph.prunable if group.kind == kind}) == 1
    for name, units in smaller.items():
        values = decision.scores[name]
        assert sorted(values.argsort(stable=True)[: len(units)].tolist()) == units


def test_every_cut_scores_the_model_that_the_cuts_before_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores in a cut are those of the sliced model, and those of removed units are zero."""
    seen: list[tuple[dict[str, list[int]], Scores]] = []
    score = importance.Fisher.score

    def watched(self: Any, model: Any, graph: Any, calibration: Any, seed: int) -> Scores:
        found = score(self, model, graph, calibration, seed)
        seen.append((removed_before(running[-1].order, running[-1].done), found))
        return found

    running: list[Cuts] = []
    made = Cuts.__init__

    def noted(self: Cuts, folder: Path | None) -> None:
        made(self, folder)
        running.append(self)

    monkeypatch.setattr(importance.Fisher, "score", watched)
    monkeypatch.setattr(Cuts, "__init__", noted)
    run(0.4, 4)
    monkeypatch.undo()
    assert [bool(removed) for removed, _ in seen] == [False, True, True, True]
    for number, (removed, scores) in enumerate(seen):
        fresh = TestGISP().task(0.4)
        assert fresh.calibration is not None
        kept = Cut.removing(fresh.graph, removed)
        slice_model(fresh.model, fresh.graph, kept)
        small = trace(fresh.model)
        expected = importance.Fisher().score(fresh.model, small, fresh.calibration.turn(number, 2), 0)
        for name in scores:
            gone = removed.get(name, [])
            left = [unit for unit in range(len(scores[name])) if unit not in gone]
            assert not scores[name][gone].any()
            if len(left) == 1:  # a model with one KV head has other groups
                continue
            torch.testing.assert_close(scores[name][left], expected[name], rtol=1e-3, atol=1e-7)


def test_each_cut_reads_the_next_windows_and_begins_again_after_the_last() -> None:
    text = Calibration(noise(5, 1))
    turns = [text.turn(number, 2).ids for number in range(4)]
    expected = [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert all(torch.equal(found, text.ids[rows]) for found, rows in zip(turns, expected, strict=True))
    assert text.turn(3, None) is text
    assert text.turn(3, 5) is text
    assert run(0.4, 4)[1].metrics == {"cuts": 4, "calibration_tokens": 4 * 2 * 12}


def test_scores_of_removed_units_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GISPSettings(cuts=3, saliency={"magnitude": 1.0, "random": 1.0}, windows=2)
    expected = GISP(settings).run(TestGISP().task(0.4)).removed
    score = importance.Random.score

    def loud(self: Any, model: Any, graph: Any, calibration: Any, seed: int) -> Scores:
        found = score(self, model, graph, calibration, seed)
        parameters = dict(model.named_parameters())
        values = {}
        for name in found:
            member = next(member for member in graph[name].members if member.role == "in")
            rows = parameters[member.parameter].movedim(member.axis, 0)[member.rows(range(graph[name].size))]
            values[name] = torch.where(rows.flatten(1).any(1), found[name], 1e6)
        return Scores(values)

    monkeypatch.setattr(importance.Random, "score", loud)
    assert GISP(settings).run(TestGISP().task(0.4)).removed == expected


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_to_the_same_answer(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GISPSettings(cuts=5, windows=2, moving_average=0.5)
    expected = GISP(settings).run(TestGISP().task(0.4))
    task = TestGISP().task(0.4)
    task.work = tmp_path / "method"
    scored: list[int] = []
    score = importance.Fisher.score

    def killed(*args: Any) -> Scores:
        if len(scored) == 3:
            raise KilledError
        scored.append(1)
        return score(*args)

    monkeypatch.setattr(importance.Fisher, "score", killed)
    with pytest.raises(KilledError):
        GISP(settings).run(task)
    again: list[int] = []
    monkeypatch.setattr(importance.Fisher, "score", lambda *args: (again.append(1), score(*args))[1])
    if damaged:
        file = tmp_path / "method" / "cuts.safetensors"
        file.write_bytes(file.read_bytes()[:50])
    found = GISP(settings).run(task)
    assert len(again) == (5 if damaged else 2)
    assert found.removed == expected.removed
    assert found.scores is not None
    assert expected.scores is not None
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in expected.scores)


def test_one_cut_is_one_shot() -> None:
    task = TestGISP().task(0.3)
    one = GISP(GISPSettings(cuts=1, windows=None)).run(task)
    assert one.removed == METHODS["fisher"]().run(task).removed


def test_new_scores_make_another_choice() -> None:
    assert run(0.4, 8)[1].removed != run(0.4, 1)[1].removed


def test_criteria_that_read_adapters_are_refused() -> None:
    with pytest.raises(InputError, match="trains no adapters"):
        GISP(GISPSettings(saliency={"lora": 1.0})).check(TestGISP().task())

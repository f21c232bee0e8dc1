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
from secateur.errors import InputError, PlanError
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
        ("llama-gqa", 7, {"floor": 0.0, "ratio": 0.45}),
        ("llama-odd", 3, {"ranking": "layer"}),
        ("llama-odd", 2, {"kinds": ["ffn", "query"], "ratio": 0.2, "shares": {"query": 0.3}}),
        ("llama-mqa", 2, {"protect": ["layers.1.*"], "ratio": 0.2}),
        ("qwen2", 3, {}),
        ("mixtral", 2, {}),
        ("phi3", 2, {}),
    ],
)
def test_the_plan_of_all_rounds_cuts_the_dense_model_to_the_same(spec: str, rounds: int, flags: dict[str, Any]) -> None:
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


def test_every_round_removes_an_equal_part_of_the_whole() -> None:
    graph = trace(build("llama-gqa"))
    start, budget = Position(graph, graph), Budget(ratio=0.6, rounds=3, shares={"attention": 0.3})
    assert start.budget(Budget(ratio=0.6)) == Budget(ratio=0.6)
    first = start.budget(budget)
    assert first.ratio == pytest.approx(0.2)
    assert first.shares == {"attention": pytest.approx(0.1)}
    second = replace(start, done=1).budget(budget)  # nothing was removed by the first
    assert second.ratio == pytest.approx(0.4)
    assert second.shares == {"attention": pytest.approx(0.2)}


@pytest.mark.parametrize("rounds", [2, 4, 8])
def test_shares_reach_in_rounds_what_they_reach_in_one(rounds: int) -> None:
    flags = {"ratio": 0.3, "shares": {"attention": 0.25}}
    _, once = weightless("llama-gqa", 1, **flags)
    _, result = weightless("llama-gqa", rounds, **flags)
    heads = [
        [len(plan.removed(name)) for name in plan.kept if "attention" in name] for plan in (once.plan, result.plan)
    ]
    assert sum(heads[0]) == sum(heads[1]) > 0


def test_units_are_counted_as_in_the_dense_model() -> None:
    model = build("llama-gqa")
    graph = trace(model)
    name = "layers.0.mlp"
    kept = {name: [1, 4, *range(6, 40)], "layers.1.attention": [1]}
    slice_model(model, graph, kept)
    here = Position(graph, graph).after_round(model, kept, Budget(rounds=2))
    assert here.removed({name: [1, 2]}) == {name: [0, 2, 3, 4, 5, 6], "layers.1.attention": [0]}
    assert here.here({name: [1, 7], "layers.1.mlp": [3]}) == {name: [0, 3], "layers.1.mlp": [3]}
    assert here.graph["layers.1.attention"].protected is not None, "its units are query heads now"
    assert here.graph["layers.0.attention"].protected is None


def test_steps_between_rounds_are_a_share_of_all() -> None:
    settings = RecoverySettings(steps=100, between=0.3, links=2)
    assert [settings.of_round(number, 4).steps for number in (1, 2, 3, 4)] == [10, 10, 10, 70]
    assert [settings.of_round(number, 2).links for number in (1, 2)] == [1, 2]
    assert settings.of_round(1, 1) == settings
    assert RecoverySettings(steps=100, between=0.0).of_round(2, 2).steps == 100


class _KilledError(BaseException):
    """Like a signal: nothing in the library catches it."""


def _die_after(name: str, done: int, patch: pytest.MonkeyPatch) -> None:
    """Have the stage ``name`` of the round after ``done`` ones die at its end, before it is noted as finished."""
    (stage,) = (stage for stage in STAGES if stage.name == name)

    def make(result: Any, *given: Any) -> None:
        stage.make(result, *given)
        if result.here.done == done:
            raise _KilledError

    stages = tuple(replace(stage, make=make) if stage.name == name else stage for stage in STAGES)
    patch.setattr(order, "STAGES", stages)


TAUGHT = {
    "recovery.teacher": 0.5,
    "recovery.teacher_cache": 4,
    "training.checkpoint_steps": 1,
    "training.batch_size": 2,
}


def _run(output: Path, resume: bool = False) -> Any:
    asked = recipe(**TAUGHT)
    return pipeline.prune(build("llama-gqa"), tiny_tokenizer(), recipe=asked, output=output, resume=resume)


def test_killed_in_every_round_it_ends_like_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(tmp_path / "whole")
    (first,) = whole.measured.rounds
    assert len(first["recovery"]["log"]) == 2
    assert len(whole.measured.recovery["log"]) == 4
    assert whole.measured.dense.parameters > first["parameters"] > whole.measured.pruned.parameters
    for name, done in [("decide", 0), ("repair", 0), ("recovery", 0), ("rounds", 1), ("decide", 1), ("recovery", 1)]:
        with monkeypatch.context() as patch:
            _die_after(name, done, patch)
            with pytest.raises(_KilledError):
                _run(tmp_path / "out", resume=True)
        monkeypatch.setattr(order, "STAGES", STAGES)
    resumed = _run(tmp_path / "out", resume=True)
    assert resumed.plan == whole.plan
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)
    assert [one["parameters"] for one in resumed.measured.rounds] == [first["parameters"]]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    small, _ = secateur.load(tmp_path / "out")
    again = secateur.apply_plan(tmp_path / "out" / "secateur" / "plan.json", build("llama-gqa"))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in small.state_dict().items()
    }


def test_a_round_may_have_nothing_to_remove() -> None:
    flags = {"budget.rounds": 6, "budget.ratio": 0.19, "budget.kinds": ["attention"], "method": "magnitude"}
    asked = recipe(**flags, **{"recovery.reconstruct": True, "recovery.reconstruct_tokens": 160})
    result = pipeline.prune(build("llama-gqa"), tiny_tokenizer(), recipe=asked)
    sizes = [result.measured.dense.parameters, *(one["parameters"] for one in result.measured.rounds)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) <= 3 < len(sizes) == 6
    assert sizes[-1] >= result.measured.pruned.parameters


def test_the_last_recovery_reads_on_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []

    def train(model: Any, ids: Any, settings: Any, *, steps: int, order: Any, **_: Any) -> list[Any]:
        read.append([order(place) for place in range(steps * settings.batch_size)])
        return []

    monkeypatch.setattr("secateur.recovery.finetune.train", train)
    asked = recipe(**{"recovery.repair": False, "training.batch_size": 2})
    pipeline.prune(build("llama-gqa"), tiny_tokenizer(), recipe=asked)
    assert list(map(len, read)) == [4, 8]
    assert len(set(read[0] + read[1])) == 12


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"budget.kinds": ["layer"]}, "has layer"),
        ({"method": "lorashear"}, "lorashear trains"),
        ({"method": "ddp"}, "ddp trains"),
        ({"recovery.links": 6}, "leaves 4 steps"),
    ],
)
def test_what_cannot_go_in_rounds_is_refused_with_the_recipe(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe(**flags)


@pytest.mark.parametrize(("ratio", "words"), [(1e-4, "smallest step"), (0.9, "A ratio of 0.9 of all parameters")])
def test_a_ratio_that_all_rounds_together_cannot_reach_is_refused_in_the_numbers_of_the_recipe(
    ratio: float, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        weightless("llama-gqa", 2, ratio=ratio)


def test_several_ratios_and_comparisons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another model"):
        pipeline.prune_ratios(recipe(), [0.2, 0.3], tmp_path / "out")
    with pytest.raises(InputError, match="one round by every method"):
        compare(recipe(), ["fisher"], [0.2], tmp_path / "out")
    assert not (tmp_path / "out").exists()

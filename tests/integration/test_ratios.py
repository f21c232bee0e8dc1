"""Several ratios from one run: each is what a run to it alone gives, and later plans come from the scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import call
from safetensors.torch import load_file

import secateur
from secateur import pipeline
from secateur.config import Recipe, load_recipe, revise
from secateur.errors import InputError, PlanError
from secateur.inspection import plans
from secateur.methods.gisp import GISP
from secateur.stages import STAGES, effort_for, order
from secateur.testing.tiny import TINY
from secateur.types import PruningPlan

SMALL = """
budget: {ratio: 0.7}
calibration: {text: letters.txt, window: 16, tokens: 96}
method: {name: gisp, cuts: 4, windows: 2}
recovery: {text: letters.txt, window: 16, tokens: 256, steps: 2, repair: false}
evaluation: {text: letters.txt, window: 16, tokens: 96, speed: false, baseline: null}
training: {precision: fp32}
"""
RATIOS = "0.1,0.2"


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    """With a recipe for its model and its text."""
    (place / "small.yaml").write_text(SMALL)
    return place


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


class Runs:
    """Counts the runs of the method."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, run = 0, GISP.run

        def counted(*args: Any) -> Any:
            self.count += 1
            return run(*args)

        patch.setattr(GISP, "run", counted)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The folder of a finished run to two ratios."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        runs = Runs(patch)
        result = call("prune", "tiny", "-o", "out", "--recipe", "small.yaml", "--ratios", RATIOS)
    assert result.exit_code == 0, result.stderr
    assert runs.count == 1
    assert result.stdout.count("recovered") == 2
    return place / "out"


def recipe(**flags: Any) -> Recipe:
    return revise(load_recipe(Path("small.yaml")), {"model.name": "tiny", **flags})


def test_each_ratio_is_what_a_run_to_it_alone_gives(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["ratio-0.1", "ratio-0.2"]
    for ratio, cuts in ((0.1, 2), (0.2, 4)):
        folder = finished / f"ratio-{ratio}"
        alone = pipeline.prune(*secateur.load("tiny"), recipe=recipe(**{"budget.ratio": ratio, "method.cuts": cuts}))
        plan = PruningPlan.load(folder / "secateur" / "plan.json")
        assert plan.kept == alone.plan.kept
        assert plan.ratio_asked == ratio
        written, expected = load_file(folder / "model.safetensors"), alone.model.state_dict()
        assert all(torch.equal(written[name], expected[name]) for name in written)
        metrics = json.loads((folder / "secateur" / "metrics.json").read_text())
        assert metrics["recovered"]["perplexity"] == alone.metrics["recovered"]["perplexity"]


def test_a_limit_is_for_all_ratios_together(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[str | None] = []

    def stop(recipes: list[Recipe]) -> None:
        limits.extend(one.effort.within for one in recipes)
        raise KilledError

    monkeypatch.setattr(pipeline, "_rehearse_ratios", stop)
    with pytest.raises(KilledError):
        pipeline.prune_ratios(recipe(**{"effort.within": "30m"}), [0.1, 0.2, 0.1], "limited")
    assert limits == ["900s", "900s"]


def test_the_time_by_default_is_for_all_ratios_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a run has one."""
    tree = recipe().model_dump(mode="json", exclude_unset=True)
    del tree["recovery"]["steps"]
    seen: list[str | None] = []

    def stop(asked: Recipe, *_: Any) -> None:
        seen.append(asked.effort.within)
        raise KilledError

    monkeypatch.setattr(pipeline, "effort_for", lambda asked, on_cpu, runs: effort_for(asked, on_cpu=False, runs=runs))
    monkeypatch.setattr(pipeline, "sized", stop)
    with pytest.raises(KilledError):
        pipeline.prune_ratios(tree, [0.1, 0.2, 0.1], "by-default")
    assert seen == ["900s"]


class KilledError(BaseException):
    """Like a signal: nothing in the library catches it."""


def test_a_killed_run_goes_on_where_it_was(finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(result: Any, *_: Any) -> None:
        if result.given is not None:
            raise KilledError
        pruned.make(result, *_)

    [pruned] = [stage for stage in STAGES if stage.name == "pruned"]
    with monkeypatch.context() as patch:
        patch.setattr(order, "STAGES", tuple(replace(s, make=dies) if s is pruned else s for s in STAGES))
        with pytest.raises(KilledError):
            pipeline.prune_ratios(recipe(), [0.1, 0.2], place / "again")
    runs = Runs(monkeypatch)
    with pytest.raises(InputError, match="not empty"):
        pipeline.prune_ratios(recipe(), [0.1, 0.2], place / "again")
    found = pipeline.prune_ratios(recipe(), [0.1, 0.2], place / "again", resume=True)
    assert list(found) == [0.1, 0.2]
    assert runs.count == 0
    for ratio in found:
        one, other = (
            load_file(folder / f"ratio-{ratio}" / "model.safetensors") for folder in (finished, place / "again")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
    before = {path: path.stat().st_mtime_ns for path in (place / "again").rglob("*")}
    assert pipeline.prune_ratios(recipe(), [0.2, 0.1], place / "again", resume=True) == found
    assert {path: path.stat().st_mtime_ns for path in (place / "again").rglob("*")} == before


def test_a_dry_run_checks_every_ratio_and_writes_nothing(place: Path) -> None:
    result = call("prune", "tiny", "-o", "dry", "--recipe", "small.yaml", "--ratios", RATIOS, "--dry-run")
    assert result.exit_code == 0, result.stderr
    with pytest.raises(PlanError, match="cannot be reached"):
        pipeline.prune_ratios(recipe(), [0.1, 0.95], place / "dry")
    with pytest.raises(PlanError, match="less than the smallest step"):
        pipeline.prune_ratios(recipe(), [0.00001, 0.2], place / "dry")
    assert not (place / "dry").exists()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lorashear", "changes weights while it chooses"),
        ("loraprune", "changes weights while it chooses"),
        ("obs", "belong to one ratio"),
        ("flap", "belong to one ratio"),
    ],
)
def test_methods_whose_scores_do_not_decide_alone_are_refused(method: str, reason: str, place: Path) -> None:
    with pytest.raises(InputError, match=f"One run of {method} cannot .* {reason}.* gisp") as refused:
        pipeline.prune_ratios({"model": {"name": "tiny"}, "method": method}, [0.1, 0.2], place / "refused")
    assert "lorashear" not in str(refused.value).partition("choose another")[2]
    assert not (place / "refused").exists()


def test_one_ratio_and_several_are_two_requests() -> None:
    result = call("prune", "tiny", "-o", "both", "--ratio", "0.1", "--ratios", RATIOS)
    assert result.exit_code == 1
    assert "--ratio for one ratio, or --ratios for several" in result.stderr


def test_plans_for_other_ratios_come_from_the_scores_of_a_run(finished: Path, place: Path) -> None:
    result = call("plan", str(finished / "ratio-0.2"), "--ratios", "0.05,0.1,0.2", "-o", "plans")
    assert result.exit_code == 0, result.stderr
    found = {ratio: PruningPlan.load(place / "plans" / f"ratio-{ratio}.json") for ratio in (0.05, 0.1, 0.2)}
    for ratio in (0.1, 0.2):
        assert found[ratio].kept == PruningPlan.load(finished / f"ratio-{ratio}" / "secateur" / "plan.json").kept
    for smaller, larger in ((0.05, 0.1), (0.1, 0.2)):
        for name in found[smaller].kept:
            assert set(found[smaller].removed(name)) <= set(found[larger].removed(name))
    alone = pipeline.prune(
        *secateur.load("tiny"), recipe=recipe(**{"budget.ratio": 0.05, "method.cuts": 1, "recovery.steps": 0})
    )
    assert found[0.05].kept == alone.plan.kept
    small = secateur.apply_plan(place / "plans" / "ratio-0.05.json", TINY["llama-gqa"]())
    assert all(torch.equal(value, alone.model.state_dict()[name]) for name, value in small.state_dict().items())


def test_a_method_that_scores_once_answers_larger_ratios_too(place: Path) -> None:
    flags = {"method": "magnitude", "recovery.steps": 0, "budget.ratio": 0.1}
    asked = recipe().model_dump(mode="json", exclude_unset=True)
    del asked["method"]
    pipeline.run(revise(secateur.config.recipe_of(asked), flags), place / "magnitude")
    [plan] = plans(place / "magnitude", [0.3], place / "larger").values()
    expected = pipeline.prune(TINY["llama-gqa"](), None, method="magnitude", ratio=0.3)
    assert plan.kept == expected.plan.kept


def test_what_the_scores_do_not_answer_is_refused_and_nothing_is_written(finished: Path, place: Path) -> None:
    run, new = finished / "ratio-0.2", place / "new"
    with pytest.raises(PlanError, match=r"ends at a ratio of 0\.2, and 0\.3 is beyond it"):
        plans(run, [0.1, 0.3], new)
    with pytest.raises(InputError, match="has no scores"):
        plans(place / "tiny", [0.1], new)
    other = place / "edited"
    shutil.copytree(run / "secateur", other / "secateur")
    plan = PruningPlan.load(other / "secateur" / "plan.json")
    name = "layers.0.mlp"
    plan.model_copy(update={"kept": {**plan.kept, name: plan.removed(name)}}).save(other / "secateur" / "plan.json")
    with pytest.raises(PlanError, match="do not give the plan beside them: gisp chose by more"):
        plans(other, [0.1], new)
    (other / "secateur" / "scores.safetensors").write_bytes(b"\x08")
    with pytest.raises(InputError, match="cannot be read"):
        plans(other, [0.1], new)
    assert not new.exists()


def test_a_run_does_not_decide_about_code_of_the_model(
    finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = place / "trusting"
    shutil.copytree(finished / "ratio-0.2" / "secateur", other / "secateur")
    file = other / "secateur" / "recipe.yaml"
    file.write_text(file.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert load_recipe(file).model.trust_remote_code
    asked: list[bool] = []
    opened = secateur.inspection.outline
    monkeypatch.setattr(
        secateur.inspection, "outline", lambda **flags: (asked.append(flags["trust_remote_code"]), opened(**flags))[1]
    )
    plans(other, [0.1], place / "untrusted")
    assert asked == [False]

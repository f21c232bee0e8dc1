"""Recovery with everything it has, through the whole pipeline on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import pipeline
from secateur.config import Recipe, load_recipe, revise
from secateur.data import texts
from secateur.errors import InputError
from secateur.recovery import CachedTeacher, cache
from secateur.recovery.curriculum import Curriculum
from secateur.stages import making
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer


def _text(folder: Path, name: str, words: str) -> Path:
    parts = words.split()
    paragraphs = (" ".join(parts[i % 11 :] + parts[: i % 11] + [str(i)]) * 24 for i in range(80))
    (folder / name).write_text("\n\n".join(paragraphs))
    return folder / name


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    letters = _text(tmp_path, "letters.txt", "the letter came late and nobody in the house had asked who wrote it")
    ships = _text(tmp_path, "ships.txt", "seven ships left harbour before dawn but only three were seen again by noon")
    talk = _text(
        tmp_path, "talk.txt", "please explain how bread rises . yeast eats sugar and the gas it gives off lifts"
    )
    settings = [
        "method=lorashear",
        "method.periods=1",
        "method.period_steps=2",
        "recovery.steps=8",
        "recovery.tokens=1024",
    ]
    settings += ["calibration.tokens=128", "evaluation.tokens=128", "evaluation.speed=false", "training.precision=fp32"]
    settings += [f"{section}.text=[{letters},{ships}]" for section in ("calibration", "recovery", "evaluation")]
    settings += [f"{section}.window=16" for section in ("calibration", "recovery", "evaluation")]
    settings += ["recovery.round_steps=2", "recovery.validation_tokens=192", "recovery.patience=0"]
    return load_recipe(
        None,
        [
            *settings,
            f"recovery.instructions={talk}",
            "recovery.instruction_share=0.5",
            "recovery.instruction_tokens=512",
        ],
    )


def _prune(recipe: Recipe, **options: Any) -> Any:
    return pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe, **options)


def test_rounds_and_stages_are_measured_logged_and_drawn(recipe: Recipe, tmp_path: Path) -> None:
    result = _prune(recipe, output=tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "secateur" / "metrics.json").read_text())
    names = {Path(name).name for name in metrics["reference"]}
    assert names == {"letters.txt", "ships.txt", "talk.txt"}
    rounds = metrics["recovery"]["rounds"]
    assert [(entry["step"], entry["stage"]) for entry in rounds] == [
        (0, "text"), (2, "text"), (4, "instructions"), (6, "instructions")
    ]  # fmt: skip
    for entry in rounds:
        assert sum(entry["weights"].values()) == pytest.approx(1)
        assert set(entry["losses"]) == set(metrics["reference"])
    report = (tmp_path / "out" / "secateur" / "report.html").read_text()
    assert "What recovery read" in report
    assert report.count("talk.txt</title>") == 2
    assert result.teacher is None


def test_the_watched_text_is_neither_trained_on_nor_evaluated(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: dict[tuple[str, ...], set[str]] = {}  # documents of different splits differ, see tests/unit/data
    load_blocks = texts.load_blocks

    def watched(settings: Any, split: str, *more: Any) -> Any:
        splits.setdefault(tuple(Path(name).stem for name in settings.text), set()).add(split)
        return load_blocks(settings, split, *more)

    monkeypatch.setattr(texts, "load_blocks", watched)
    found = texts.read_texts(TINY["llama-gqa"](), tiny_tokenizer(), recipe.texts, recipe.seed)
    assert splits[("letters", "ships", "talk")] == {"calibration"}
    assert splits[("talk",)] == {"recovery"}
    assert found.validation is not None
    assert len(found.validation.names) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"recovery.skew": 0.1, "recovery.hidden_weight": 0.2},
        {"recovery.teacher_cache": 20},
        {"recovery.finetuning": "full", "recovery.learning_rate": 1e-3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_killed_in_recovery_it_goes_on_from_its_checkpoint(
    settings: dict[str, Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = revise(
        recipe, {"training.checkpoint_steps": 2, "recovery.teacher": 0.5, "method": "magnitude", **settings}
    )
    whole = _prune(recipe)
    step_end, steps = Curriculum.on_step_end, []

    def watched(self: Curriculum, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        step_end(self, args, state, control, model=model, **more)

    monkeypatch.setattr(Curriculum, "on_step_end", watched)
    with pytest.raises(KeyboardInterrupt):
        _prune(recipe, output=tmp_path / "out")
    resumed = _prune(recipe, output=tmp_path / "out", resume=True)
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_predictions_on_disk_take_the_place_of_the_dense_model(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = revise(recipe, {"method": "magnitude", "recovery.teacher": 1.0, "recovery.teacher_cache": 20})
    whole, recover, seen = _prune(recipe), making.recover, []

    def dies(model: Any, task: Any, *rest: Any, **more: Any) -> Any:
        seen.append(task.teacher)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return recover(model, task, *rest, **more)

    monkeypatch.setattr(making, "recover", dies)
    with pytest.raises(KeyboardInterrupt):
        _prune(recipe, output=tmp_path / "out")
    monkeypatch.setattr(cache, "_likeliest", lambda *_: pytest.fail("the dense model read again"))
    resumed = _prune(recipe, output=tmp_path / "out", resume=True)
    assert all(isinstance(teacher, CachedTeacher) for teacher in seen)
    assert resumed.teacher is None
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt", "ships.txt", "talk.txt", "out"}
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_repair_alone_mends_a_one_shot_cut(recipe: Recipe) -> None:
    settings = {"method": "magnitude", "recovery.steps": 0}
    plain = _prune(revise(recipe, settings))
    mended = _prune(revise(recipe, {**settings, "recovery.repair": True, "recovery.repair_tokens": 1024}))
    assert mended.plan.kept == plain.plan.kept
    repair = mended.metrics["repair"]
    assert repair["loss_after"] <= repair["loss_before"]  # of a model that never learned anything it need not fall
    assert any(refit["step"] > 0 for refit in repair["refits"].values())
    assert all(refit["after"] <= refit["before"] for refit in repair["refits"].values())
    with pytest.raises(InputError, match="reads text"):
        pipeline.prune(TINY["llama-gqa"](), None, recipe=revise(recipe, {**settings, "recovery.repair": True}))


def test_reconstruction_goes_on_from_repair_without_the_dense_model_changing_before_the_cut(recipe: Recipe) -> None:
    settings = {"method": "magnitude", "recovery.steps": 0}
    on = {"recovery.reconstruct": True, "recovery.reconstruct_tokens": 1024, "recovery.reconstruct_learning_rate": 1e-3}
    from secateur.config import revise

    plain = _prune(revise(recipe, {**settings, **on, "recovery.repair": False}))
    both = _prune(revise(recipe, {**settings, **on, "recovery.repair": True, "recovery.repair_tokens": 1024}))
    assert both.plan.kept == plain.plan.kept
    repair, reconstruct = both.metrics["repair"], both.metrics["reconstruct"]
    assert any(block["kept"] for block in reconstruct["blocks"].values())
    assert all(block["after"] <= block["before"] for block in reconstruct["blocks"].values())
    assert reconstruct["loss_after"] <= reconstruct["loss_before"]
    if repair["step"] > 0:  # it begins with what repair left
        others = plain.metrics["reconstruct"]["blocks"]
        assert any(block["before"] != others[name]["before"] for name, block in reconstruct["blocks"].items())
    with pytest.raises(InputError, match="reads text"):
        pipeline.prune(TINY["llama-gqa"](), None, recipe=revise(recipe, {**settings, **on}))


def test_repair_starts_from_learnt_gates(recipe: Recipe) -> None:
    settings = {"method": {"name": "ddp", "steps": 4}, "recovery.steps": 0, "evaluation.baseline": None}
    plain = _prune(revise(recipe, settings))
    mended = _prune(revise(recipe, {**settings, "recovery.repair": True, "recovery.repair_tokens": 1024}))
    assert mended.plan.kept == plain.plan.kept
    repair = mended.metrics["repair"]
    assert repair["loss_after"] <= repair["loss_before"]
    if not repair["step"]:  # then the folded gates are still in the weights
        for name, value in plain.model.state_dict().items():
            assert torch.equal(mended.model.state_dict()[name], value), name

"""``secateur analyze`` end to end on a tiny model, and ``prune`` that obeys its file."""

from __future__ import annotations

import copy
import csv
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import write_letters
from rich.console import Console
from typer.testing import CliRunner

import secateur
from secateur import inspection, tables
from secateur.analysis import Analysis, Trial
from secateur.cli import app
from secateur.config import load_recipe
from secateur.errors import InputError, PlanError, SecateurError
from secateur.planning import Budget, restrict
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.workspace import Workspace

FILES = {"analysis.json", "analysis.csv", "heatmap.png", "SHA256SUMS"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_letters(tmp_path)


def _recipe(text: Path, *more: str) -> Any:
    sizes = ("calibration.window=16", "calibration.tokens=128", "evaluation.precision=fp32")
    return load_recipe(None, [f"calibration.text={text}", *sizes, *more])


def test_the_command_writes_table_file_and_picture(text: Path, tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    words = ["analyze", str(tmp_path / "tiny"), "-o", str(tmp_path / "out"), "--text", str(text)]
    result = CliRunner().invoke(app, [*words, "--window", "16", "--tokens", "128", "--set", "budget.protect_share=0.3"])
    assert result.exit_code == 0, result.output
    assert "layers.1.mlp" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    analysis = Analysis.load(tmp_path / "out" / "analysis.json")
    assert len(analysis.trials) == 2 * 4  # two ratios of two groups in each of two layers
    rows = list(csv.DictReader((tmp_path / "out" / "analysis.csv").open()))
    assert [float(row["kl"]) for row in rows] == pytest.approx([trial.kl for trial in analysis.trials], rel=1e-4)
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".out.secateur").exists()

    arguments = [*words, "--window", "16", "--tokens", "128", "--set", "budget.protect_share=0.3", "--resume"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    said = " ".join(again.stderr.split())  # lines are folded
    assert "This analysis is finished" in said
    assert "Nothing is done again" in said
    assert "layers.1.mlp" in again.stdout
    other = CliRunner().invoke(app, [*arguments, "--ratios", "0.3"])
    assert other.exit_code == 1
    assert "is not empty" in other.stderr

    file = tmp_path / "out" / "analysis.json"
    recipe = load_recipe(
        None, [f"budget.protect_from={file}", "budget.protect_share=0.8", "budget.floor=0", "recovery.steps=0"]
    )
    pruned = secateur.prune(TINY["llama-gqa"](), method="magnitude", ratio=0.03, recipe=recipe)
    assert set(pruned.plan.kept) == set(analysis.deviations("kl")) - set(analysis.sensitive(0.8, "kl"))


def test_interrupted_and_resumed_it_measures_the_same_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = TINY["llama-odd"](), _recipe(text)
    whole = inspection.analyze(model, tiny_tokenizer(), recipe=recipe)
    measured: list[int] = []
    try_out = inspection.measure_cuts.__globals__["_Run"].try_out

    def interrupted(self: Any, chosen: Any, layer: int) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(layer)
        return try_out(self, chosen, layer)

    monkeypatch.setattr("secateur.importance.knowledge._Run.try_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspection.analyze(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out")
    assert measured == [0, 1]
    with pytest.raises(InputError, match="--resume"):
        inspection.analyze(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out")
    with pytest.raises(InputError, match="another recipe"):
        inspection.analyze(model, tiny_tokenizer(), recipe=recipe, ratios=[0.3], output=tmp_path / "out", resume=True)
    measured.clear()
    again = inspection.analyze(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out", resume=True)
    assert measured == [2]
    assert [(t.group, t.ratio) for t in again.trials] == [(t.group, t.ratio) for t in whole.trials]
    assert [t.kl for t in again.trials] == pytest.approx([t.kl for t in whole.trials], abs=1e-6)
    assert Analysis.load(tmp_path / "out" / "analysis.json") == again


def test_no_analysis_goes_on_with_other_weights_or_text_nor_is_given_back_for_them(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, tuned = TINY["llama-gqa"](), TINY["llama-gqa"]()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    settings: dict[str, Any] = {"recipe": _recipe(text), "ratios": [0.5], "output": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "write_analysis", dies)
        with pytest.raises(KeyboardInterrupt):
            inspection.analyze(model, tiny_tokenizer(), **settings)
    with pytest.raises(InputError, match=r"Changed since: the model's weights\. Put back"):
        inspection.analyze(tuned, tiny_tokenizer(), **settings, resume=True)
    before = text.read_text()
    text.write_text(before.replace("letter", "parcel"))
    with pytest.raises(InputError, match=r"Changed since: the text of calibration\. Put back"):
        inspection.analyze(model, tiny_tokenizer(), **settings, resume=True)
    text.write_text(before)
    found = inspection.analyze(model, tiny_tokenizer(), **settings, resume=True)
    assert inspection.analyze(model, tiny_tokenizer(), **settings, resume=True) == found
    with pytest.raises(InputError, match="finished, and the model's weights are not those"):
        inspection.analyze(tuned, tiny_tokenizer(), **settings, resume=True)


def test_interrupted_while_its_folder_is_written_it_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, out = TINY["llama-gqa"](), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("secateur.export.analysis.heat_map", dies)
        with pytest.raises(KeyboardInterrupt):
            inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), output=out)
    assert not out.exists()
    inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), output=out, resume=True)
    assert {path.name for path in out.iterdir()} == FILES


def test_what_cannot_be_analysed_is_refused_early(text: Path, tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    with pytest.raises(InputError, match=r"criterion 'lora' reads adapters.*taylor"):
        inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), criterion="lora")
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), ratios=[1.0])
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--ratios", "0.2,2"])
    assert result.exit_code == 1
    assert "--ratios 2" in result.stderr


def test_a_damaged_model_is_refused_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    model, recipe, before = TINY["llama-gqa"](), _recipe(text), sorted(tmp_path.iterdir())
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")  # of a token that the text does not hold
    with pytest.raises(SecateurError, match=r"embed_tokens\.weight is not finite"):
        inspection.analyze(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_fails_before_anything_is_kept_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise InputError("no scores")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(inspection, "measure_cuts", fail)
    with pytest.raises(InputError, match="no scores"):
        inspection.analyze(TINY["llama-gqa"](), tiny_tokenizer(), recipe=_recipe(text), output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kept", ["{}", '{"a": 1}', "[3]", '[{"group": 3}]', "3"])
def test_kept_trials_that_are_damaged_are_measured_again(kept: str, text: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.write_text("trials.json", kept)
    assert (work.read_json("trials.json", list[Trial]) or []) == []


def test_order_and_repeats_of_ratios_mean_nothing_and_a_column_is_called_as_it_was_asked(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = _recipe(text), tmp_path / "out"

    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inspection, "write_analysis", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inspection.analyze(TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe, ratios=[0.9999, 0.3], output=out)
    again = inspection.analyze(
        TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe, ratios=[0.3, 0.9999, 0.3], output=out, resume=True
    )
    assert [trial.ratio for trial in again.trials] == [0.3, 0.9999] * 4
    console = Console(width=200, record=True, file=StringIO())
    console.print(tables.analysis(again, by="kl", share=0.1))
    shown = console.export_text()
    assert "-99.99%: KL" in shown
    assert "-100%" not in shown
    assert "most sensitive 10% by kl (1 of 4 groups)" in " ".join(shown.split())


def test_an_analysis_of_other_weights_is_refused_and_of_another_type_is_not(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = TINY["llama-gqa"](), tmp_path / "out"
    inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), output=out, ratios=[0.5])
    recipe = load_recipe(None, [f"budget.protect_from={out / 'analysis.json'}", "budget.floor=0", "recovery.steps=0"])
    settings: dict[str, Any] = {"method": "magnitude", "ratio": 0.03, "recipe": recipe, "dry_run": True}
    secateur.prune(model, **settings)
    secateur.prune(copy.deepcopy(model).bfloat16(), **settings)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # as a fine-tune might
    with pytest.raises(PlanError, match=r"with other weights.*secateur analyze"):
        secateur.prune(model, **settings)
    Analysis.load(out / "analysis.json").model_copy(update={"weights": None}).save(out / "analysis.json")
    said: list[str] = []
    monkeypatch.setattr("secateur.analysis.say", said.append)
    secateur.prune(model, **settings)
    assert "has no digest of its weights" in said[0]


def test_a_run_is_not_resumed_with_an_analysis_that_holds_something_else_by_then(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    model, file = TINY["llama-gqa"](), tmp_path / "an" / "analysis.json"
    found = inspection.analyze(model, tiny_tokenizer(), recipe=_recipe(text), output=file.parent, ratios=[0.5])
    recipe = load_recipe(None, [f"budget.protect_from={file}", "budget.floor=0", "recovery.steps=0"])
    settings: dict[str, Any] = {"method": "magnitude", "ratio": 0.03, "recipe": recipe, "output": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr("secateur.stages.making.cut", dies)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(model, **settings)
    trials = [found.trials[0].model_copy(update={"kl": 9.0}), *found.trials[1:]]
    found.model_copy(update={"trials": trials}).save(file)
    with pytest.raises(InputError, match=f"another recipe.*{file} holds"):
        secateur.prune(model, **settings, resume=True)
    found.save(file)
    secateur.prune(model, **settings, resume=True)


def test_the_budget_refuses_an_analysis_of_another_model(text: Path, tmp_path: Path) -> None:
    inspection.analyze(
        TINY["llama-gqa"](), tiny_tokenizer(), recipe=_recipe(text), output=tmp_path / "out", ratios=[0.5]
    )
    budget = Budget(protect_from=tmp_path / "out" / "analysis.json", protect_share=0.5)
    graph = restrict(secateur.trace(TINY["llama-gqa"]()), budget)
    reasons = [group.protected for group in graph if group.protected and "most sensitive 50%" in group.protected]
    assert len(reasons) == 2
    with pytest.raises(PlanError, match="of another model"):
        restrict(secateur.trace(TINY["llama-mha"]()), budget)
    with pytest.raises(ValueError, match="protect_from"):
        Budget(protect_from=tmp_path / "x.json", runs_on="vllm")

"""``secateur compare`` from end to end on a tiny model: fair rows, resumed rows, and what it writes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import secateur
from secateur import inspection, pipeline, tables
from secateur.cli import app
from secateur.compare import Leaderboard, Row, compare, contents, folder, run, schedule_of, shown, split_overrides
from secateur.compare.report import write_report
from secateur.config import revise
from secateur.errors import InputError, ModelError, SecateurError
from secateur.graph import trace
from secateur.methods import METHODS
from secateur.methods.loraprune import LoRAPrune
from secateur.planning import make_plan
from secateur.recovery import finetune
from secateur.stages import making
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

TEXT = "A hedge is cut twice a year, in early summer and in autumn; each cut is to leave a few leaves on every shoot. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama-odd").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = "".join(json.dumps({"text": f"{number} {TEXT * 3}"}) + "\n" for number in range(60))
    (folder / "train.jsonl").write_text(text)
    (folder / "held-out.txt").write_text("In autumn the hedge is cut for the last time before the frost. " * 8)
    return folder


def settings(model: Path, *more: str) -> list[str]:
    overrides = [
        f"{section}.{key}"
        for section in ("calibration", "recovery")
        for key in (f"text={model / 'train.jsonl'}", "window=12", "tokens=192")
    ]
    overrides += [f"evaluation.text={model / 'held-out.txt'}", "evaluation.window=12", "evaluation.tokens=240"]
    return [*overrides, "recovery.steps=2", "evaluation.speed=false", *more]


def recipe_of(model: Path, *more: str) -> secateur.Recipe:
    return secateur.load_recipe(None, settings(model, *more), {"model.name": str(model)})


def test_every_method_trains_for_the_same_number_of_steps(model: Path) -> None:
    own: dict[str, Any] = {"loraprune": {"steps": 6, "every": 2}, "lorashear": {"periods": 2, "period_steps": 2}}
    planned = schedule_of(recipe_of(model), ["random", "loraprune", "lorashear", "wanda"], [0.2, 0.4], own)
    assert len(planned) == 8
    assert {run.pruning_steps(row) + row.recovery.steps for row in planned} == {8}
    assert {row.recovery.steps for row in planned} == {8, 2, 4}
    assert [row.budget.ratio for row in planned] == [0.2] * 4 + [0.4] * 4
    shared = [
        row.model_dump(exclude={"method": True, "budget": {"ratio"}, "recovery": {"steps", "repair"}})
        for row in planned
    ]
    assert all(row == shared[0] for row in shared)


def test_no_recovery_stops_before_its_last_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    original = making.recover

    def watched(*arguments: Any, **more: Any) -> Any:
        done = original(*arguments, **more)
        assert not any("stopped" in entry for entry in done.rounds)
        made.append(done.log[-1]["step"])
        return done

    monkeypatch.setattr(making, "recover", watched)
    hopeless = ["recovery.min_gain=0.5", "recovery.patience=1", "recovery.validation_tokens=48"]
    recipe = recipe_of(model, "recovery.steps=6", "recovery.round_steps=1", *hopeless)
    board = compare(recipe, ["magnitude"], [0.2], tmp_path / "out")
    assert [row.recovery_steps for row in board.rows] == made == [6, 6]


def test_whole_layers_are_another_kind(model: Path) -> None:
    [row] = schedule_of(recipe_of(model), ["shortgpt"], [0.3], {})
    assert row.budget.kinds == ("layer",)


def test_settings_of_one_method_are_told_from_those_of_all() -> None:
    shared, own = split_overrides(["lorashear.periods=3", "budget.floor=0.5", "flap.compensate=false", "seed=2"])
    assert shared == ["budget.floor=0.5", "seed=2"]
    assert own == {"lorashear": {"periods": 3}, "flap": {"compensate": False}}


def test_settings_below_a_key_of_one_method_are_set_as_in_a_recipe(model: Path) -> None:
    shared, own = split_overrides(["lorashear.saliency.taylor=2", "lorashear.saliency.fisher={weight: 3}"])
    assert shared == []
    [row] = schedule_of(recipe_of(model), ["lorashear"], [0.2], own)
    assert row.method.settings.model_dump()["saliency"] == {"taylor": 2.0, "fisher": {"weight": 3}}
    assert split_overrides(["my.package:Mine.saliency.taylor=2"])[1] == {"my.package:Mine": {"saliency.taylor": 2}}


def test_a_recipe_sets_its_own_method(model: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(model, "recovery.steps=0", "method.name=magnitude", "method.over=all"), tmp_path / "out"
    board = compare(recipe, ["magnitude", "wanda"], [0.2], out)
    settings_of = {row.method: row.settings for row in board.rows}
    assert settings_of["magnitude"]["over"] == "all"
    assert settings_of["wanda"] == METHODS["wanda"].Settings().model_dump(mode="json")
    (tmp_path / "shared.yaml").write_text(board.recipe)
    shared = secateur.load_recipe(tmp_path / "shared.yaml")
    assert shared.recovery.steps == 0
    assert shared.method == secateur.Recipe().method
    assert "\n  ratio:" not in board.recipe
    with pytest.raises(InputError, match="other settings of magnitude"):
        compare(revise(recipe, {"method.over": "consumers"}), ["magnitude"], [0.2], out, resume=True)
    [_, row] = schedule_of(recipe, ["random", "magnitude"], [0.2], {"magnitude": {"over": "consumers"}})
    assert row.method.settings.model_dump()["over"] == "consumers"


@pytest.mark.parametrize("resume", [False, True])
def test_settings_of_a_method_that_is_not_compared_are_refused(model: Path, tmp_path: Path, resume: bool) -> None:
    with pytest.raises(InputError, match="lorashear has settings and is not compared"):
        compare(recipe_of(model), ["wanda"], [0.2], tmp_path, settings={"lorashear": {"periods": 3}}, resume=resume)
    with pytest.raises(InputError, match="nonsense"):
        compare(recipe_of(model), ["wanda"], [0.2], tmp_path, settings={"wanda": {"nonsense": 3}}, resume=resume)


def test_a_kill_before_anything_has_its_name_is_no_comparison_and_a_file_of_the_users_is(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    folder.check_folder(tmp_path, {}, resume=True)
    (tmp_path / "rows" / ".comparison.json.saving").write_text("{")
    folder.check_folder(tmp_path, {}, resume=True)
    (tmp_path / "rows" / "mine").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        folder.check_folder(tmp_path, {}, resume=True)


def test_an_infinite_perplexity_is_read_back(tmp_path: Path) -> None:
    row = Row(method="random", ratio=0.5, reached=0.5, pruned={"a": math.inf}, recovered={"a": 9.0})
    (tmp_path / "rows").mkdir()
    folder.write_row(tmp_path, row)
    assert folder.read_rows(tmp_path) == {("random", 0.5): row}
    board = _board(model="m", tokens={"a": 3}, dense={"a": 2.0}, rows=[row])
    write_report(board, tmp_path)
    assert Leaderboard.model_validate_json((tmp_path / "results.json").read_text()) == board
    with (tmp_path / "results.csv").open() as file:
        assert float(list(csv.DictReader(file))[1]["perplexity_pruned"]) == math.inf
    assert "<td>inf</td>" in (tmp_path / "report.html").read_text()


def test_infinite_numbers_of_the_dense_model_are_read_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_of(model, "recovery.steps=0"), tmp_path / "out"
    measured: list[str] = []

    def infinite(result: Any, texts: Any) -> None:
        measured.append(result.recipe.method.name)
        making.measure_dense(result, texts)
        perplexity = dict.fromkeys(result.measured.dense.perplexity, math.inf)
        result.measured.dense = result.measured.dense.model_copy(update={"perplexity": perplexity})

    monkeypatch.setattr(run.stages, "measure_dense", infinite)
    boards = [compare(recipe, ["random"], [0.2], out, resume=resume) for resume in (False, True)]
    assert len(measured) == 1
    assert boards[0].dense == boards[1].dense
    assert set(boards[0].dense.values()) == {math.inf}


def test_a_comparison_without_any_result_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(self: Any, task: Any) -> Any:
        raise RuntimeError("out of memory")

    out, more = tmp_path / "out", ["--methods", "magnitude", "--ratios", "0.2"]
    arguments = ["compare", str(model), "-o", str(out), *more]
    for override in settings(model, "recovery.steps=0"):
        arguments += ["--set", override]
    with monkeypatch.context() as patch:
        for method in (METHODS["random"], METHODS["magnitude"]):
            patch.setattr(method, "run", faulty)
        failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 1
    assert "No row has a result" in failed.output
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0


def test_from_the_command_line(model: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(model), "--methods", "magnitude,loraprune,flap", "--ratios", "0.2,0.3"]
    arguments += ["-o", str(tmp_path / "out"), "--set", "loraprune.steps=2", "--set", "loraprune.every=1"]
    for override in settings(model):
        arguments += ["--set", override]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "magnitude" in found.stdout
    board = Leaderboard.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert [(row.method, row.ratio) for row in board.rows] == [
        (method, ratio) for ratio in (0.2, 0.3) for method in ("random", "loraprune", "magnitude", "flap")
    ]
    for row in board.rows:
        assert row.error is None
        assert row.parameters is not None
        assert row.reached == pytest.approx(1 - row.parameters / board.dense_parameters, rel=1e-9)
        assert row.pruning_steps + row.recovery_steps == board.steps == 4
        assert board.mean(row.pruned) != board.mean(row.recovered)
        assert row.scoring_seconds is not None
        assert row.scoring_peak_bytes is not None
        assert row.scoring_extra_bytes is not None
        assert row.scoring_peak_bytes >= row.scoring_extra_bytes >= 0
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["dense", *(row.method for row in board.rows)]
    assert float(lines[1]["perplexity_recovered"]) == pytest.approx(board.mean(board.rows[0].recovered))
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<tr>") == 10
    assert "data:image/png;base64," in page

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--resume" in again.output


def test_it_goes_on_with_what_is_missing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    original = run._run

    def watched(recipe: Any, shared: Any) -> Row:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(recipe.method.name)
        return original(recipe, shared)

    monkeypatch.setattr(run, "_run", watched)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe_of(model, "recovery.steps=0"), ["magnitude", "wanda"], [0.2], tmp_path / "out")
    assert len(Leaderboard.model_validate_json((tmp_path / "out" / "results.json").read_text()).rows) == 2
    done.clear()
    board = compare(recipe_of(model, "recovery.steps=0"), ["magnitude", "wanda"], [0.2], tmp_path / "out", resume=True)
    assert done == ["wanda"]
    assert [row.method for row in board.rows] == ["random", "magnitude", "wanda"]
    with pytest.raises(InputError, match="other settings"):
        compare(recipe_of(model, "seed=1"), ["magnitude"], [0.2], tmp_path / "out", resume=True)
    own, recipe = {"magnitude": {"over": "all"}}, recipe_of(model, "recovery.steps=0")
    with pytest.raises(InputError, match="other settings of magnitude"):
        compare(recipe, ["magnitude"], [0.2], tmp_path / "out", settings=own, resume=True)


def test_a_row_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, "recovery.steps=0", "budget.runs_on=vllm", "budget.ratio=0.1", "budget.kinds=ffn")
    board = compare(recipe, ["flap"], [0.1], tmp_path / "out")
    [floor, flap] = board.rows
    assert floor.error is None
    assert flap.error is not None
    assert "compensate" in flap.error
    assert "compensate" in (tmp_path / "out" / "report.html").read_text()


def test_rows_are_added_to_those_that_are_there(model: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(model, "recovery.steps=0"), tmp_path / "out"
    compare(recipe, ["magnitude"], [0.3], out)
    kept = (out / "rows" / "magnitude-0.3.json").read_text()
    board = compare(recipe, ["wanda"], [0.3000001], out, resume=True)
    assert [(row.method, row.ratio) for row in board.rows] == [
        ("random", 0.3),
        ("magnitude", 0.3),
        ("random", 0.3000001),
        ("wanda", 0.3000001),
    ]
    assert Leaderboard.model_validate_json((out / "results.json").read_text()) == board
    assert (out / "rows" / "magnitude-0.3.json").read_text() == kept
    assert board.rows[1] == Row.model_validate_json(kept)
    with (out / "results.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == ["dense", "random", "magnitude", "random", "wanda"]
    own = {"magnitude": {"over": "all"}}
    board = compare(recipe, ["magnitude"], [0.2], out, settings=own, resume=True)
    assert len(board.rows) == 6
    page = (out / "report.html").read_text()
    assert "magnitude at 20.0% (" in page
    assert "magnitude at 30.0% (" in page


def test_rows_of_changed_text_or_weights_are_not_mixed(model: Path, tmp_path: Path) -> None:
    there, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, there)
    recipe = recipe_of(there, "recovery.steps=0")
    compare(recipe, ["magnitude"], [0.2], out)
    page = (out / "results.json").read_bytes()
    for name in ("held-out.txt", "model.safetensors"):
        before = (there / name).read_bytes()
        (there / name).write_bytes(before[:-7] + b"drizzle")
        what = "held-out.txt" if name.endswith("txt") else "model"
        with pytest.raises(InputError, match=rf"content\..*{what} \w+ there"):
            compare(recipe, ["wanda"], [0.2], out, resume=True)
        (there / name).write_bytes(before)
    assert (out / "results.json").read_bytes() == page
    assert len(compare(recipe, ["magnitude"], [0.2], out, resume=True).rows) == 2


@pytest.mark.parametrize("also", ["./train.jsonl", "copy.jsonl"])
def test_nothing_is_evaluated_that_is_trained_on_by_another_name(
    also: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(model / "train.jsonl", "train.jsonl")
    shutil.copy(model / "train.jsonl", "copy.jsonl")
    shutil.copy(model / "held-out.txt", "held-out.txt")
    names = ["held-out.txt", also]
    recipe = recipe_of(model, *(f"{section}.text=train.jsonl" for section in ("calibration", "recovery")))
    many = {f"{section}.tokens": 6000 for section in ("calibration", "recovery", "evaluation")}
    recipe = revise(recipe, {**many, "evaluation.text": names})
    loaded, tokenizer = secateur.load(str(model))
    planned = run.schedule_of(recipe, ["wanda"], [0.2], {})
    graphs = {row.budget.kinds: trace(loaded) for row in planned}
    texts = run._read_texts(loaded, tokenizer, planned, graphs)
    alone = revise(recipe, {"evaluation.text": ["held-out.txt"]})
    whole = run._read_texts(loaded, tokenizer, run.schedule_of(alone, ["wanda"], [0.2], {}), graphs)
    assert texts.evaluation is not None
    assert whole.evaluation is not None
    assert texts.evaluation.sources.count("held-out.txt") == len(whole.evaluation)  # from its beginning
    assert texts.calibration is not None
    assert texts.recovery is not None
    read = {tuple(row) for blocks in (texts.calibration, texts.recovery) for row in blocks.ids.tolist()}
    numbers = _documents(tokenizer, read)
    held_out = [
        row for row, name in zip(texts.evaluation.ids.tolist(), texts.evaluation.sources, strict=True) if name == also
    ]
    assert len(numbers) > 10
    assert _documents(tokenizer, held_out)
    assert not numbers & _documents(tokenizer, held_out)


def _documents(tokenizer: Any, rows: Any) -> set[str]:
    """The numbers that documents of ``train.jsonl`` begin with."""
    return {word for row in rows for word in re.findall(r"\d+", tokenizer.decode(row))}


def test_rows_of_a_changed_method_of_ones_own_are_made_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, path = recipe_of(model, "recovery.steps=0"), tmp_path / "out", tmp_path / "own_method.py"
    source = """
from secateur.importance import CRITERIA
from secateur.methods.base import Decision, Method

class Own(Method):
    name, summary, needs = "own", "", "text"

    def run(self, task):
        return Decision(task.allocate(task.score(CRITERIA["{criterion}"]())))
"""
    found = []
    for criterion in ("magnitude", "taylor", "taylor"):
        path.write_text(source.replace("{criterion}", criterion))
        spec = importlib.util.spec_from_file_location("own_method", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_method", module)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)  # not a cached .pyc of the same second
        monkeypatch.setitem(METHODS, "own", module.Own)
        board = compare(recipe, ["own", "magnitude", "taylor"], [0.3], out, resume=out.exists())
        found.append({row.method: row.pruned for row in board.rows})
        stamp = (out / "rows" / "own-0.3.json").stat().st_mtime_ns
        found[-1]["when"] = {"own": float(stamp)}
    assert found[0]["own"] == found[0]["magnitude"] != found[0]["taylor"]
    assert found[1]["own"] == found[1]["taylor"]
    assert found[1]["when"] == found[2]["when"]  # nothing has changed: it stays


def test_a_method_that_trains_says_for_how_long(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(LoRAPrune):
        training_steps = 0

    monkeypatch.setitem(METHODS, "silent", Silent)
    with pytest.raises(InputError, match="training_steps"):
        compare(recipe_of(model), ["silent"], [0.2], tmp_path / "out")


def test_instructions_have_as_many_steps_in_every_row(model: Path) -> None:
    more = (f"recovery.instructions={model / 'held-out.txt'}", "recovery.instruction_share=0.3")
    own: dict[str, Any] = {"loraprune": {"steps": 36}}
    rows = run.schedule_of(recipe_of(model, *more, "recovery.steps=10"), ["random", "loraprune"], [0.2], own)
    assert [row.recovery.steps for row in rows] == [46, 10]
    for row in rows:
        [_, second] = finetune._stages(("a",), ("b",), row.recovery)
        [first, _] = finetune._stages(("a",), ("b",), row.recovery)
        assert second.until - first.until == 3
    with pytest.raises(InputError, match="at least 2"):
        run.schedule_of(recipe_of(model, *more, "recovery.steps=0"), ["random", "loraprune"], [0.2], own)


def test_a_task_is_known_by_its_items(model: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("{}")
    (tmp_path / "base.yaml").write_text("output_type: multiple_choice")
    (tmp_path / "a.yaml").write_text(f"task: a\ninclude: base.yaml\ndata_files: {{test: ['{tmp_path}/items.jsonl']}}\n")
    seen = set()
    for name in ("a.yaml", "items.jsonl", "base.yaml", ""):
        found = contents.digests(recipe_of(model), [str(tmp_path / "a.yaml"), "arc_easy"])
        seen.add(found[str(tmp_path / "a.yaml")])
        assert "arc_easy" not in found
        if name:
            with (tmp_path / name).open("a") as file:
                file.write(" ")
    assert len(seen) == 4


def test_a_task_is_known_by_what_it_calls_and_includes_further_down(model: Path, tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "part-0.parquet").write_text("0")
    (tmp_path / "more-1.jsonl").write_text("{}")
    (tmp_path / "_base").write_text("include: _root\ntest_split: '* test *'\n")
    (tmp_path / "_root").write_text("data_dir: items\ndata_files: 'more-*.jsonl'\n")
    (tmp_path / "utils.py").write_text("def process(): ...\n")
    (tmp_path / "a.yaml").write_text("task: a\ninclude: _base\nprocess_docs: !function utils.process\n")
    seen = set()
    for name in ("_root", "utils.py", "items/part-0.parquet", "more-1.jsonl", None):
        seen.add(contents.digests(recipe_of(model), [str(tmp_path / "a.yaml")])[str(tmp_path / "a.yaml")])
        if name is not None:
            with (tmp_path / name).open("a") as file:
                file.write("#")
    assert len(seen) == 5


def test_an_analysis_is_known_by_what_it_holds(model: Path, tmp_path: Path) -> None:
    seen = set()
    for text in ("{}", "{ }"):
        (tmp_path / "analysis.json").write_text(text)
        recipe = recipe_of(model, f"budget.protect_from={tmp_path / 'analysis.json'}")
        seen.add(contents.digests(recipe, [])[str(tmp_path / "analysis.json")])
    assert len(seen) == 2


def test_large_weights_are_read_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_PIECE", 4)
    path = tmp_path / "model.safetensors"
    seen = set()
    for fill in (b"a", b"b"):
        path.write_bytes(fill * 1000)
        seen.add(contents._digest([path]))
    path.write_bytes(b"b" * 999)
    assert len({*seen, contents._digest([path])}) == 3


def test_whatever_a_method_raises_is_its_row_and_resuming_tries_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: Any, task: Any) -> Any:
        raise RuntimeError("out of memory: you tried to allocate 12 GB")

    recipe, out = recipe_of(model, "recovery.steps=0"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["magnitude"], "run", faulty)
        board = compare(recipe, ["magnitude", "wanda"], [0.2], out)
    errors = {row.method: row.error for row in board.rows}
    assert errors.pop("magnitude") == "not enough memory: out of memory: you tried to allocate 12 GB"
    assert errors == {"random": None, "wanda": None}
    tried: list[str] = []
    original = run._run

    def watched(row: Any, shared: Any) -> Row:
        tried.append(row.method.name)
        return original(row, shared)

    monkeypatch.setattr(run, "_run", watched)
    board = compare(recipe, ["magnitude", "wanda"], [0.2], out, resume=True)
    assert tried == ["magnitude"]
    assert [row.error for row in board.rows] == [None] * 3


def test_a_ratio_out_of_reach_is_a_row_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    board = compare(recipe_of(model, "recovery.steps=0"), ["magnitude"], [0.97, 0.2], tmp_path / "out")
    assert [row.error is None for row in board.rows] == [True, True, False, False]
    assert "97" in str(board.rows[-1].error)


def test_a_comparison_that_cannot_start_leaves_nothing(model: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(model, "recovery.steps=0"), tmp_path / "out"
    with pytest.raises(SecateurError, match="97"):
        compare(recipe, ["magnitude"], [0.97], out)
    with pytest.raises(ModelError):
        compare(revise(recipe, {"model.name": str(tmp_path / "missing")}), ["magnitude"], [0.2], out)
    assert not out.exists()


def test_a_comparison_that_failed_before_anything_was_measured_is_begun_anew(tmp_path: Path) -> None:
    folder.check_folder(tmp_path, {"seed": 0}, resume=False)
    rows = folder.open_folder(tmp_path, {"seed": 0})
    folder.check_folder(tmp_path, {"seed": 1}, resume=False)
    (rows / "dense.json").touch()
    with pytest.raises(InputError, match="--resume"):
        folder.check_folder(tmp_path, {"seed": 0}, resume=False)
    with pytest.raises(InputError, match=r"seed 0 there, 1 here"):
        folder.check_folder(tmp_path, {"seed": 1}, resume=True)


def test_layers_are_tried_before_they_are_cut(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[tuple[str, ...]] = []

    def watched(network: Any, kinds: Any = ()) -> Any:
        tried.append(tuple(kinds))
        return original(network, kinds)

    original = run.checked_trace
    for module in (run, pipeline):
        monkeypatch.setattr(module, "checked_trace", watched)
    recipe = recipe_of(model, "recovery.steps=0")
    run._rehearse(recipe, schedule_of(recipe, ["random", "shortgpt"], [0.2], {}))
    assert sorted(tried) == [("ffn", "attention"), ("layer",)]
    tried.clear()
    network = build("llama-odd")
    graph = original(network, ["layer"])
    budget = revise(recipe, {"budget.kinds": ["layer"]}).budget
    plan = make_plan(graph, {"layers": [0]}, budget, method="shortgpt")
    secateur.apply_plan(plan, network)
    assert tried == [(), ("layer",)]
    assert network.config.num_hidden_layers == build("llama-odd").config.num_hidden_layers - 1


@pytest.mark.parametrize(
    ("methods", "ratios", "message"),
    [
        ([], [0.2], "at least one method"),
        (["no-such"], [0.2], "Unknown method no-such.*shortgpt"),
        (["wanda"], [1.2], "between 0 and 1"),
        (["wanda"], [], "between 0 and 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    methods: list[str], ratios: list[float], message: str, tmp_path: Path
) -> None:
    recipe = secateur.load_recipe(flags={"model.name": str(tmp_path / "missing")})
    with pytest.raises(InputError, match=message):
        compare(recipe, methods, ratios, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_and_text_are_looked_at_before_a_model_is_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load", lambda **_: pytest.fail("the model was opened"))
    monkeypatch.setattr(inspection, "load", lambda **_: pytest.fail("the model was opened"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="lm-eval"):
        compare(recipe_of(model), ["magnitude"], [0.2], tmp_path / "out", tasks=["arc_easy"])
    with pytest.raises(InputError, match="lm-eval"):
        inspection.evaluate(recipe_of(model), ["arc_easy"])
    (model / "text.md").write_text("A hedge.")
    with pytest.raises(SecateurError, match=r"ending \.md"):
        compare(recipe_of(model, f"evaluation.text={model / 'text.md'}"), ["magnitude"], [0.2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _board(**values: Any) -> Leaderboard:
    """A comparison without rows of a model of one parameter."""
    shared = {"seed": 0, "recipe": "", "window": 1, "steps": 0, "tokens_per_step": 1, "dense_parameters": 1}
    return Leaderboard.model_validate({**shared, **values})


def test_columns_are_in_the_same_order_whatever_failed_first(tmp_path: Path) -> None:
    board = _board(
        model="<b>m</b>",
        tokens={"a": 3},
        dense={"a": 2.0},
        dense_tasks={"four": {"acc": 0.65, "acc_stderr": 0.1}},
        chance={"four": 0.25},
    )
    board.rows.append(Row(method="flap", ratio=0.125, error="</td><script>alert(1)</script>"))
    speed = {"batch 1": {"prefill_tokens_per_s": 2.0, "dense_prefill_tokens_per_s": 1.0}}
    tasks = {"four": {"acc": 0.45, "acc_stderr": 0.1}}
    done = Row(method="shortgpt", ratio=0.1, kinds=["layer"], settings={"batch_size": 3}, pruned={"a": 3.0})
    done.recovered, done.tasks, done.speed = {"a": 2.5}, tasks, speed
    board.rows += [done, done.model_copy(update={"ratio": 0.2})]
    write_report(board, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    names = list(lines[0])
    assert names[-1] == "error"
    assert names.index("recovered, a") == names.index("pruned, a") + 1
    expected = ["four", "four_stderr", "four_retention", "four_retention_stderr", "retention", "retention_stderr"]
    assert names[names.index("four") :][:6] == expected
    assert float(lines[2]["four_retention"]) == pytest.approx(0.5)
    assert lines[0]["retention_stderr"] == ""
    assert float(lines[2]["retention_stderr"]) == pytest.approx(0.1 / 0.4 * math.sqrt(1 + 0.5**2))
    assert lines[1]["error"].startswith("</td>")
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "<b>m" not in page
    assert "12.5%" in page
    assert "shortgpt (batch_size=3).\nWhat all share" in page
    assert page.count("shortgpt (layer)") == 1


def test_retention_is_corrected_for_chance() -> None:
    board = _board(
        model="m",
        tokens={"a": 3, "b": 1},
        dense={"a": 2.0, "b": 4.0},
        dense_tasks={
            "four": {"acc": 0.65, "acc_norm": 0.75},
            "two": {"acc": 0.8},
            "open": {"acc": 0.4, "acc_stderr": 0.1},
            "odd": {"exact_match": 1.0},
        },
        chance={"four": 0.25, "two": 0.5},
    )
    tasks = {"four": {"acc": 0.3, "acc_norm": 0.5}, "two": {"acc": 0.5}, "open": {"acc": 0.0, "acc_stderr": 0.0}}
    row = Row(method="x", ratio=0.2, tasks=tasks)
    assert board.retention(row, "four") == (pytest.approx(0.5), None)
    assert board.retention(row, "two") == (pytest.approx(0.0), None)
    assert board.retention(row, "odd") is None
    assert board.retention(row, "open") == (0.0, 0.0)
    assert board.mean_retention(row) == (pytest.approx(0.5 / 3), None)
    board.rows.append(row)
    assert "0.000 ± 0.000" in shown(board)[1]
    assert board.mean(board.dense) == pytest.approx((2.0**3 * 4.0) ** 0.25)
    assert board.mean({"a": 2.0}) is None


def test_the_error_of_retention_is_that_of_a_quotient() -> None:
    """Against the spread of the quotient of normal draws."""
    tasks = {"a": (0.40, 0.02, 0.60, 0.015, 0.25), "b": (0.30, 0.01, 0.50, 0.02, 0.0)}
    board = _board(
        model="m",
        tokens={"a": 1},
        dense={"a": 2.0},
        dense_tasks={name: {"acc": dense, "acc_stderr": error} for name, (_, _, dense, error, _) in tasks.items()},
        chance={"a": 0.25},
    )
    values = {name: {"acc": value, "acc_stderr": error} for name, (value, error, *_) in tasks.items()}
    retention = board.mean_retention(Row(method="x", ratio=0.2, tasks=values))
    draws = np.random.default_rng(0)
    shares = [
        (draws.normal(value, error, 20_000) - chance) / (draws.normal(dense, dense_error, 20_000) - chance)
        for value, error, dense, dense_error, chance in tasks.values()
    ]
    assert retention is not None
    assert retention.stderr == pytest.approx(float(np.std(np.mean(shares, axis=0))), rel=0.05)


def test_the_terminal_says_below_the_table_why_a_row_failed() -> None:
    board = _board(
        model="m",
        tokens={"a": 3},
        dense={"a": 2.0},
    )
    board.rows.append(Row(method="shortgpt", ratio=0.2, error="Set budget.kinds=[layer]."))
    console = Console(markup=False, width=100, record=True, file=io.StringIO())
    console.print(tables.leaderboard(board))
    lines = console.export_text().splitlines()
    assert any(line.split() == ["shortgpt", "20.0%", "failed"] for line in lines)
    assert any("shortgpt at 20.0%: Set budget.kinds=[layer]." in line for line in lines)
    assert not any("prefill" in line for line in lines)  # nothing was timed

"""The command line on a tiny model with a tokenizer: a whole run, shown again, measured, inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from letters import call

from secateur import inspection
from secateur.config import dump, load_recipe
from secateur.data import read_ids
from secateur.evaluation import perplexity
from secateur.inspection import evaluate
from secateur.loading import load
from secateur.types import PruningPlan

ARTEFACTS = {"SHA256SUMS", "graph.json", "metrics.json", "plan.json", "recipe.yaml", "run.jsonl", "verification.json"}
SMALL = """
calibration: {text: letters.txt, window: 32, tokens: 256}
method: {name: lorashear, periods: 2, period_steps: 2}
recovery: {text: letters.txt, window: 32, tokens: 512, steps: 4}
evaluation: {text: letters.txt, window: 32, tokens: 512}
"""


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    """With a recipe for its model and its text."""
    (place / "small.yaml").write_text(SMALL)
    return place


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = call("prune", "tiny", "-o", "out", "--recipe", "small.yaml", "--ratio", "0.15")
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    for word in ("dense", "pruned", "recovered", "without LoRA", "perplexity, letters.txt", "parameters", "decode"):
        assert word in shown
    assert "windows of 32 tokens" in shown
    return place / "out"


def test_a_run_leaves_a_folder_that_explains_itself(finished: Path) -> None:
    assert {path.name for path in (finished / "secateur").iterdir()} >= ARTEFACTS
    plan = PruningPlan.load(finished / "secateur" / "plan.json")
    assert plan.ratio_asked == 0.15
    metrics = json.loads((finished / "secateur" / "metrics.json").read_text())
    assert metrics["recovered"]["parameters"] == plan.parameters_after < metrics["dense"]["parameters"]
    assert not (finished.parent / ".out.secateur").exists()
    assert not list(finished.rglob("*.bin"))


def test_the_written_recipe_is_the_recipe_that_ran(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    flags = {"model.name": "tiny", "budget.ratio": 0.15}
    assert (finished / "secateur" / "recipe.yaml").read_text() == dump(load_recipe(Path("small.yaml"), flags=flags))


def test_a_finished_run_is_shown_again_not_done_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = call("prune", "tiny", "-o", "out", "--recipe", "small.yaml", "--ratio", "0.15", "--resume")
    assert result.exit_code == 0
    assert "recovered" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_another_recipe_does_not_touch_a_finished_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    for flags in (["--ratio", "0.3", "--resume"], ["--ratio", "0.15"]):
        result = call("prune", "tiny", "-o", "out", "--recipe", "small.yaml", *flags)
        assert result.exit_code == 1
        assert "not empty" in result.stderr


def test_a_dry_run_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = call("prune", "tiny", "-o", "dry", "--recipe", "small.yaml", "--dry-run")
    assert result.exit_code == 0
    assert "node groups" in result.stderr
    assert not (place / "dry").exists()
    assert not (place / ".dry.secateur").exists()


def test_evaluate_prints_and_writes_the_numbers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    options = ["--text", "letters.txt", "--window", "32", "--tokens", "512", "--json", "numbers.json"]
    result = call("evaluate", "out", *options)
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(Path("numbers.json").read_text())
    stored = json.loads((finished / "secateur" / "metrics.json").read_text())["recovered"]
    assert numbers["model"]["parameters"] == stored["parameters"]
    assert numbers["tokens"] == {"letters.txt": 16 * 31}
    assert "perplexity, letters.txt" in result.stdout


def test_evaluate_reads_a_file_from_its_beginning_to_its_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    model, tokenizer = load("tiny", device="cpu")
    whole = read_ids("letters.txt", tokenizer, window=64)
    recipe = load_recipe(
        flags={
            "model.name": "tiny",
            "model.device": "cpu",
            "evaluation.text": "letters.txt",
            "evaluation.window": 64,
            "evaluation.precision": "fp32",
            "evaluation.speed": False,
        }
    )
    numbers = evaluate(recipe)
    assert numbers["tokens"] == {"letters.txt": len(whole) * 63}
    assert numbers["model"]["perplexity"]["letters.txt"] == pytest.approx(perplexity(model, whole), rel=1e-4)
    numbers = evaluate(recipe, max_tokens=200)
    assert numbers["model"]["perplexity"]["letters.txt"] == pytest.approx(perplexity(model, whole[:3]), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "There is no text file missing.txt"),
        (["--text", "letters.txt", "--window", "65"], "at most 64"),
        (["--text", "letters.txt", "--json", "."], "is a folder"),
        (["--text", "letters.txt", "--json", "nowhere/numbers.json"], "there is no folder nowhere"),
    ],
)
def test_what_would_fail_in_the_end_is_found_before_the_tasks(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(inspection, "check_tasks", lambda names: None)  # with or without lm-eval
    monkeypatch.setattr(inspection, "evaluate_tasks", lambda *a, **o: pytest.fail("tasks ran"))
    result = call("evaluate", "tiny", "--tasks", "some-task", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_inspect_shows_what_can_be_cut_and_verifies_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = call("inspect", "tiny", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "layers.*.mlp" in result.stdout
    assert "2 x 40" in result.stdout
    assert "slice = mask" in result.stdout


def test_inspect_as_json_is_json(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    graph = json.loads(call("inspect", "tiny", "--json").stdout)
    assert {group["name"] for group in graph["groups"]} >= {"layers.0.mlp", "layers.1.attention", "hidden", "vocab"}


def test_settings_reach_every_command(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(finished.parent)
    graph = json.loads(call("inspect", "tiny", "--json", "--set", "budget.kinds=[hidden]").stdout)
    assert {group["name"]: group["protected"] for group in graph["groups"]}["hidden"] is None
    plan, folder = "out/secateur/plan.json", tmp_path / "half"
    result = call("apply", plan, "tiny", "-o", str(folder), "--set", "export.dtype=bfloat16")
    assert result.exit_code == 0, result.stderr
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    result = call("verify", str(folder), "--set", "model.trust_remote_code=true")
    assert result.exit_code == 0, result.stderr
    assert "bfloat16" in result.stdout
    numbers = tmp_path / "numbers.json"
    options = ["--recipe", "small.yaml", "--set", "evaluation.speed=false", "--json", str(numbers)]
    assert call("evaluate", "tiny", *options).exit_code == 0
    assert json.loads(numbers.read_text())["tokens"] == {"letters.txt": 16 * 31}, "the recipe's window and tokens"

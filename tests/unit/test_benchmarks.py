"""The benchmarks' own arithmetic; what they measure takes a real model and hours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script

from secateur.config import Recipe, dump, load_recipe, revise
from secateur.data import Texts, TokenBlocks
from secateur.graph import trace
from secateur.importance import CRITERIA
from secateur.importance.knowledge import cuts
from secateur.recovery import source_losses
from secateur.stages import texts_of
from secateur.testing.tiny import VOCAB, build
from secateur.testing.tokenizer import tiny_tokenizer


def steps(recipe: Recipe) -> int:
    own = recipe.method.settings.model_dump()
    pruning = own.get("warmup_steps", 0) + own.get("periods", 0) * own.get("period_steps", 0)
    return int(pruning + recipe.recovery.steps)


def test_every_variant_is_another_recipe_with_the_same_number_of_steps(tmp_path: Path) -> None:
    ablations = script("ablations")
    default = load_recipe(None, ["method=lorashear"])
    found = ablations.variants(default, tmp_path / "analysis.json")
    recipes = {name: revise(default, more) for name, more in found.items()}
    assert len({dump(recipe) for recipe in recipes.values()}) == len(recipes) > 10
    assert len({ablations.key(recipe, None) for recipe in recipes.values()}) == len(recipes)

    assert {steps(recipe) for recipe in recipes.values()} == {steps(default)}
    assert not [name for name, r in recipes.items() if r.recovery.round_steps and r.recovery.patience]  # ends early


@pytest.mark.parametrize(
    ("override", "one_shot"),
    [
        ("method.period_steps=41", True),
        ("method.warmup_steps=5", True),
        ("method.saliency={hesso-first-order: 1.0}", False),  # no method cuts by it in one shot
    ],
)
def test_defaults_of_ones_own_have_variants_too(override: str, one_shot: bool) -> None:
    default = load_recipe(None, ["method=lorashear", override])
    found = script("ablations").variants(default, None)
    assert {steps(revise(default, more)) for more in found.values()} == {steps(default)}
    assert ("one shot with repair" in found) == one_shot


def test_runs_of_other_settings_texts_and_analyses_are_other_runs_and_are_not_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablations = script("ablations")
    values = iter(range(10, 100))
    monkeypatch.setattr(ablations, "one_run", lambda recipe, text: {"text": float(next(values)), "seconds": 0})
    texts = [tmp_path / "a" / "wiki.txt", tmp_path / "b" / "wiki.txt"]
    for text in texts:
        text.parent.mkdir()
        text.write_text(str(text))
    analysis, file = tmp_path / "analysis.json", tmp_path / "rows.jsonl"

    def run(names: str, text: Path = texts[0], overrides: tuple[str, ...] = ()) -> int:
        known: dict[str, Any] = {"json": file, "model": "m", "ratios": "0.2,0.5", "seeds": "0", "dry_run": False}
        known |= {"variants": names, "overrides": list(overrides), "text": text, "analysis": analysis}
        before = len(ablations.read(file))
        ablations.run(argparse.Namespace(**known))
        return len(ablations.read(file)) - before

    protected = "analysis, 10% protected"
    analysis.write_text("one")
    assert run(f"default; {protected}") == 4
    assert run(f"default; {protected}") == 0
    analysis.write_text("another")
    assert run(f"default; {protected}") == 2
    first = ablations.tables(ablations.read(file))
    assert first.count("| default |") == 1
    lines = [line for line in first.splitlines() if line.startswith(f"| {protected} (")]
    assert [line.split("|")[2:4] for line in lines] == [[" 11.00 ", " +10.0 % "], [" 14.00 ", " +40.0 % "]]
    assert run("default", texts[1]) == run("default; rank x 2", overrides=("lora.rank=4",)) - 2 == 2
    file.write_text(file.read_text() + json.dumps({"variant": "rank x 2", "ratio": 0.2, "seed": 0, "text": 7.0}) + "\n")
    text = ablations.tables(ablations.read(file))
    assert text.count("| variant |") == 4
    assert "m lora.rank=4:" in text
    assert "Runs that do not say what their default was:" in text
    assert "| rank x 2 | 7.00 |  |" in text


def test_the_table_pairs_by_seed_and_goes_between_its_marks(tmp_path: Path) -> None:
    ablations = script("ablations")
    rows = [
        {"variant": name, "ratio": 0.2, "seed": seed, "perplexity": {"pruned": {"a": value, "b": value}}}
        for name, values in {"default": (40.0, 60.0), "other": (44.0, 66.0)}.items()
        for seed, value in enumerate(values)
    ]
    text = ablations.table(rows)
    assert "| other | 55.00 | +10.0 ± 0.0 % |" in text
    assert "| default | 50.00 |  |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablations.BEGIN}\nold\n{ablations.END}\nafter\n")
    ablations.write(text, page)
    assert page.read_text() == f"before\n{ablations.BEGIN}\n{text}{ablations.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="no place for the table"):
        ablations.write(text, page)


def test_a_line_cut_short_by_a_kill_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key": "a"}\n{"key": "b", "per')
    ablations = script("ablations")
    assert [row["key"] for row in ablations.read(file)] == ["a"]
    with file.open("a") as again:
        again.write('{"key": "c"}\n')
    assert [row["key"] for row in ablations.read(file)] == ["a", "c"]


def test_peers_recover_with_all_that_our_own_rows_recover_with(tmp_path: Path) -> None:
    task_of, dense = script("peers/run").recovery_task, build("llama-gqa")
    dense.save_pretrained(tmp_path)
    blocks = TokenBlocks(torch.arange(48).view(4, 12), ("a",) * 4)
    texts = Texts(recovery=blocks, instructions=blocks, validation=blocks)
    recipe = load_recipe(None, ["recovery.teacher=1.0"])
    task = task_of(recipe, texts, tmp_path)
    assert task.text is task.instructions is task.validation is blocks
    assert task.reference == pytest.approx(source_losses(dense, blocks, recipe.training))
    assert task.teacher is not None
    plain = task_of(load_recipe(None, ["recovery.teacher=0"]), Texts(recovery=blocks), tmp_path / "not opened")
    assert (plain.instructions, plain.validation, plain.reference, plain.teacher) == (None, None, {}, None)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gpt-neox"])
def test_the_cost_of_an_analysis_is_counted_by_the_layers_that_run(family: str) -> None:
    """Whatever a family calls its attention."""
    cost, model = script("analysis_cost"), build(family)
    graph = trace(model)
    chosen = cuts(graph, CRITERIA["magnitude"]().score(model, graph, None, 0), [0.5])
    blocks = TokenBlocks(torch.arange(384).view(8, 48) % VOCAB, ("a",) * 8)
    forwards = [dict(module.__dict__) for module in model.modules()]
    naive, _ = cost.one_way(model, graph, blocks, chosen, cached=False)
    cached, _ = cost.one_way(model, graph, blocks, chosen, cached=True)
    whole = len({cut.made for cut in chosen}) + 1
    assert whole <= naive["passes"] < whole + 1  # the dense model's head runs again beside each trial
    assert 1 < cached["passes"] < naive["passes"]
    assert [dict(module.__dict__) for module in model.modules()] == forwards


def test_experiments_are_different_runs_and_methods_get_the_same_tokens_in_all() -> None:
    quality, default, model = script("quality"), load_recipe(), build("llama-gqa")
    asked = {"only": [], "ratios": [0.5], "seeds": [0], "tasks": [], "up_to": 10**9}
    runs = quality.runs_of(quality.experiments(default), default, argparse.Namespace(**asked))
    assert len({(run.row.experiment, run.key) for run in runs}) == len(runs)
    assert len({run.key for run in runs}) == len(runs) - 1  # no repair and no reconstruction is a row of both
    names = {(run.row.experiment, run.row.name) for run in runs}
    assert {(run.row.experiment, run.row.against) for run in runs} < names
    for total in quality.TOTALS:
        found = {}
        for run in runs:
            if run.recipe.effort.tokens == total:
                recipe, graph = quality.settled(run.recipe, model)
                read = {name: text.tokens for name, text in texts_of(recipe, graph).items()}
                found[run.row.name] = quality.amounts(recipe, read)
        assert len(found) == len(quality.METHODS)
        assert all(0 <= total - sum(tokens.values()) < quality.step_tokens(default) for tokens in found.values())
    small = quality.runs_of(
        quality.experiments(default), default, argparse.Namespace(**asked | {"only": ["curve"], "up_to": 200_000})
    )
    assert [run.recipe.recovery.steps for run in small] == [87] * 4 + [390] * 4


def test_quality_repeats_no_finished_run_and_shows_the_spread_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = script("quality")
    build("llama-gqa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = "A hedge is cut twice a year, in early summer and in autumn; each cut leaves a few leaves. " * 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"{i} {words}"}) + "\n" for i in range(60)))
    (tmp_path / "held-out.txt").write_text("In autumn the hedge is cut for the last time before the frost. " * 8)
    more = {"recovery.repair": True, "recovery.finetuning": "full", "recovery.learning_rate": 0.01}
    rows = [
        quality.Row("pair", name, "off", {"recovery.repair": False, "recovery.steps": 2, **flags}, (0.2,))
        for name, flags in {"off": {}, "on": more}.items()
    ]
    monkeypatch.setattr(quality, "experiments", lambda default: rows)
    file, made, original = tmp_path / "rows.jsonl", [], quality.one_run
    monkeypatch.setattr(quality, "one_run", lambda run, tasks: made.append(run) or original(run, tasks))

    def call(*more: str) -> str:
        given = ["--out", str(file), "--model", str(tmp_path / "model"), "--text", str(tmp_path / "held-out.txt")]
        for section in ("calibration", "recovery"):
            given += ["--set", f"{section}.text={tmp_path / 'train.jsonl'}", "--set", f"{section}.tokens=240"]
            given += ["--set", f"{section}.window=12"]
        assert quality.main([*given, "--set", "evaluation.window=12", *more]) == 0
        return capsys.readouterr().out

    assert "recovery 24" in call("--seeds", "0", "--dry-run")
    assert (len(made), file.exists()) == (0, False)
    assert "(one seed)" in call("--seeds", "0")
    assert len(made) == 2
    found = call("--seeds", "0,1")
    assert [(run.row.name, run.recipe.seed) for run in made[2:]] == [("off", 1), ("on", 1)]
    again = call("--seeds", "0,1")
    assert (len(made), again.count("there already")) == (4, 4)
    assert again.split("###")[1] == found.split("###")[1]

    lines = quality.finished(file).values()
    last = {(line["row"], line["seed"]): quality.number(line, "recovered") for line in lines}
    changes = [100 * (last["on", seed] / last["off", seed] - 1) for seed in (0, 1)]
    mean, apart = sum(changes) / 2, abs(changes[0] - changes[1])
    assert abs(mean) > apart > 0.05
    assert f"| off | {mean:+.1f} ± {apart / 2**0.5:.1f} ({apart:.1f}) % |" in found
    for line in lines:
        assert line["perplexity"].keys() == {"dense", "pruned", "recovered"}
        assert line["tokens"] == {"calibration": 240, "recovery": 24} | (
            {"repair": line["tokens"]["repair"]} if line["row"] == "on" else {}
        )
        assert line["seconds"].keys() >= {"decide", "recovery"}
        assert line["machine"]["torch"] == torch.__version__
    file.write_text(file.read_text()[:-5])  # killed while it wrote the last line
    assert call("--seeds", "0,1").count("there already") == 3
    assert made[-1].key == made[-2].key

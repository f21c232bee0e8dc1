"""The benchmarks' own arithmetic; what they measure takes a real model and hours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from secateur.config import dump, load_recipe, revise
from secateur.data import Texts, TokenBlocks
from secateur.recovery import source_losses
from secateur.testing.tiny import build

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name.replace('/', '_')}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_another_recipe_with_the_same_number_of_steps(tmp_path: Path) -> None:
    ablations = script("ablations")
    default = load_recipe()
    found = ablations.variants(default, tmp_path / "analysis.json")
    recipes = {name: revise(default, more) for name, more in found.items()}
    assert len({dump(recipe) for recipe in recipes.values()}) == len(recipes) > 10
    assert len({ablations.key(recipe, None) for recipe in recipes.values()}) == len(recipes)

    def steps(recipe: object) -> int:
        own = recipe.method.model_dump()  # type: ignore[attr-defined]
        pruning = own.get("warmup_steps", 0) + own.get("periods", 0) * own.get("period_steps", 0)
        return pruning + recipe.recovery.steps  # type: ignore[attr-defined,no-any-return]

    assert {steps(recipe) for recipe in recipes.values()} == {steps(default)}
    assert not [name for name, r in recipes.items() if r.recovery.round_steps and r.recovery.patience]  # ends early


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

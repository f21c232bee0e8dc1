"""A proof cannot pass on nothing: NaN, infinity, empty and missing are bad wherever something is judged to be good."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import pipeline
from secateur.compare import compare
from secateur.config import load_recipe
from secateur.errors import InputError, ModelError, SecateurError, VerificationError
from secateur.export import FORMS, ExportSettings, check_finite, save_folder
from secateur.export.agreement import agreement, is_small
from secateur.export.verify import Reference, holds_only_our_code, judge, open_folders
from secateur.graph import trace
from secateur.inspection import analyze, evaluate, verify
from secateur.surgery.rebuild import auto_map_of, modeling_source
from secateur.testing.tiny import TINY, build
from secateur.testing.tokenizer import tiny_tokenizer

NAN, INF = math.nan, math.inf
ANSWER: dict[str, Any] = {
    "class_name": "Tiny",
    "dtype": "float32",
    "parameters": 10,
    "missing_keys": [],
    "unexpected_keys": [],
    "seconds_to_open": 1.0,
    "logits_scale": 3.0,
    "logits_difference": 1e-6,
    "same_top_token": 1.0,
    "dynamic_cache_difference": 1e-6,
    "static_cache_difference": 1e-6,
    "tokenizer": None,
    "transformers": "5",
    "torch": "2",
}


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    (tmp_path / "config.json").write_text("{}")
    return Reference(tmp_path, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, 9))


def test_a_sound_answer_passes(reference: Reference) -> None:
    assert judge(reference, ANSWER).parameters == 10
    lacking = {key: value for key, value in ANSWER.items() if not key.startswith("static")}
    judge(reference._replace(static_difference=None), lacking | {"static_cache_error": "none"})
    judge(reference._replace(static_difference=NAN), ANSWER | {"static_cache_difference": NAN})


@pytest.mark.parametrize(
    "changed",
    [
        {"logits_difference": NAN},
        {"logits_difference": INF},
        {"logits_difference": ...},
        {"logits_difference": None},
        {"logits_scale": NAN, "logits_difference": NAN},
        {"logits_scale": INF, "logits_difference": 5.0},
        {"logits_scale": ...},
        {"dynamic_cache_difference": NAN},
        {"dynamic_cache_difference": ...},
        {"static_cache_difference": ...},
        {"static_cache_difference": ..., "static_cache_error": "it worked in memory"},
        {"missing_keys": ...},
        {"parameters": ...},
        {"unexpected_keys": ["more"]},
    ],
    ids=str,
)
def test_an_answer_that_says_nothing_does_not(changed: dict[str, Any], reference: Reference) -> None:
    answer = {key: value for key, value in (ANSWER | changed).items() if value is not ...}
    with pytest.raises(VerificationError):
        judge(reference, answer)


@pytest.mark.parametrize("logits", [torch.full((1, 4, 9), NAN), torch.full((1, 4, 9), INF), torch.ones(0, 4, 9)])
def test_nor_does_a_model_whose_own_logits_are_nothing(logits: torch.Tensor, reference: Reference) -> None:
    with pytest.raises(VerificationError, match="not finite"):
        judge(reference._replace(logits=logits), ANSWER)
    with pytest.raises(VerificationError, match="generates is not finite"):
        judge(reference._replace(cache_difference=NAN), ANSWER)


def test_agreement_needs_numbers_on_both_sides() -> None:
    one = torch.ones(2, 3)
    assert agreement(one + 1e-6, one, 1e-4).good
    bad = [(one * NAN, one), (one, one * NAN), (one, one * INF), (one * INF, one * INF), (one[:0], one[:0])]
    bad += [(one[:1], one), (one + 1, one)]
    assert not any(agreement(found, expected, 1e-4).good for found, expected in bad)
    assert not any(is_small(value, allowed) for value, allowed in [(None, 1), (NAN, 1), (0.0, NAN), (INF, INF)])


def test_what_is_not_finite_is_named() -> None:
    model = TINY["llama-gqa"]()
    check_finite(model, torch.float16)
    with torch.no_grad():
        model.lm_head.weight[2, 3] = 1e6
    check_finite(model, torch.bfloat16)
    with pytest.raises(ModelError, match=r"lm_head.weight holds 1e\+06, which is infinite in float16"):
        check_finite(model, torch.float16)
    with torch.no_grad():
        model.lm_head.weight[2, 3] = 0
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"begins in model\.layers\.1\.mlp\.down_proj"):
        check_finite(model)
    with torch.no_grad():
        model.model.norm.weight[0] = NAN
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite"):
        check_finite(model)


def test_a_model_that_raises_is_said_not_to_compute(tmp_path: Path) -> None:
    """``query_pre_attn_scalar`` below zero makes a complex scale, of which the kernel raises a TypeError."""
    model: Any = build("gemma3")
    model.save_pretrained(tmp_path / "bad")
    content = json.loads((tmp_path / "bad" / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(content | {"query_pre_attn_scalar": -1}))
    flags = {"model.name": str(tmp_path / "bad"), "model.device": "cpu", "method": "magnitude", "recovery.steps": 0}
    recipe = load_recipe(flags=flags)
    for way in (lambda: verify(recipe), lambda: evaluate(recipe), lambda: pipeline.run(recipe, tmp_path / "out")):
        with pytest.raises(ModelError, match="does not compute"):
            way()


def test_no_way_leads_past_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    plan = pipeline.prune(TINY["llama-gqa"](), None, method="magnitude").plan
    with torch.no_grad():
        model.model.norm.weight[0] = NAN
    model.save_pretrained(tmp_path / "bad")
    recipe = load_recipe(flags={"model.name": str(tmp_path / "bad"), "model.device": "cpu"})
    out = tmp_path / "out"
    ways: dict[str, Any] = {
        "prune": lambda: pipeline.prune(model, None, method="magnitude", output=out),
        "apply": lambda: pipeline.apply(plan, recipe, out),
        "apply_plan": lambda: secateur.apply_plan(plan, model),
        "save": lambda: save_folder(model, None, out, graph=graph, kept={}),
        "verify": lambda: verify(recipe),
        "evaluate": lambda: evaluate(recipe),
        "analyze": lambda: analyze(model, None, output=out),
        "compare": lambda: compare(recipe, ["magnitude"], [0.2], out),
    }
    ways |= {form: lambda form=form: FORMS[form].write(model, None, out, ExportSettings()) for form in FORMS}
    for name, way in ways.items():
        with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite"):
            way()
        assert not out.exists(), name


@pytest.mark.parametrize("names", ["FOLDER--evil.Evil", "owner/repo--evil.Evil", "evil.Evil"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_secateur_did_not_write_is_not_run(names: str, file: str, tmp_path: Path) -> None:
    folder, code = tmp_path / "model", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    build("llama-gqa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for place in (folder, tmp_path / "evil"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(code)
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content["auto_map"] = {"AutoModelForCausalLM": names.replace("FOLDER", str(tmp_path / "evil"))}
    (folder / file).write_text(json.dumps(content))
    recipe = load_recipe(flags={"model.name": str(folder), "model.device": "cpu"})
    with pytest.raises(InputError, match="--trust-remote-code"):
        verify(recipe)
    with pytest.raises(VerificationError, match="did not write"):
        open_folders([Reference(folder, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, 9))])
    assert not (tmp_path / "ran").exists()


def test_only_the_file_that_secateur_writes_is_ours(tmp_path: Path) -> None:
    family = type(TINY["llama-gqa"]())
    config, file = tmp_path / "config.json", tmp_path / "modeling_pruned.py"
    config.write_text(json.dumps({"auto_map": auto_map_of(family)}))
    assert not holds_only_our_code(tmp_path)
    file.write_text(modeling_source(family))
    assert holds_only_our_code(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("1/0")
    assert not holds_only_our_code(tmp_path)
    (tmp_path / "custom_generate" / "generate.py").unlink()
    config.write_text(json.dumps({"auto_map": auto_map_of(family) | {"AutoConfig": "other.Config"}}))
    assert not holds_only_our_code(tmp_path)
    config.write_text(json.dumps({"auto_map": auto_map_of(family)}))
    file.write_text(modeling_source(family) + "\nimport os\n")
    assert not holds_only_our_code(tmp_path)


@pytest.mark.parametrize("given", [3, [1], object()])
def test_what_is_no_recipe_and_no_plan_is_said(given: Any, tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    with pytest.raises(SecateurError, match="no recipe"):
        secateur.prune(model, None, method="magnitude", recipe=given)
    with pytest.raises(SecateurError, match="no plan"):
        secateur.apply_plan(given, model)
    for bad in ({"ratio": "much"}, tmp_path / "none.json", "no\0path"):
        with pytest.raises(SecateurError):
            secateur.apply_plan(bad, model)
        with pytest.raises(SecateurError):
            secateur.prune(model, None, recipe=bad)


def test_recipe_and_plan_may_be_paths_and_mappings(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: magnitude\nrecovery: {steps: 0}\nseed: 3\n")
    keys: dict[str, Any] = {"method": "magnitude", "recovery": {"steps": 0}, "seed": 3}
    first, second = (
        secateur.prune(TINY["llama-gqa"](), None, recipe=each).plan for each in (str(tmp_path / "recipe.yaml"), keys)
    )
    assert first == second
    assert first.seed == 3
    assert keys == {"method": "magnitude", "recovery": {"steps": 0}, "seed": 3}
    first.save(tmp_path / "plan.json")
    counts = {
        sum(weight.numel() for weight in secateur.apply_plan(each, TINY["llama-gqa"]()).parameters())
        for each in (first, tmp_path / "plan.json", first.model_dump())
    }
    assert counts == {first.parameters_after}

"""The whole run on a tiny model: killed after any stage it ends the same; data-free runs need no tokenizer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import write_letters

import secateur
from secateur import inspection, pipeline
from secateur.compensation import Compensated, Reconstructed
from secateur.config import Recipe, load_recipe, recipe_of, revise
from secateur.errors import InputError, ModelError, PlanError
from secateur.importance import CRITERIA
from secateur.methods import METHODS, Decision, Method, PruningTask
from secateur.methods.flap import FLAP
from secateur.methods.lhspg import Shrinking
from secateur.stages import STAGES, making, order, sizing
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer

SETTINGS = (
    "method=lorashear",
    "method.periods=2",
    "method.period_steps=2",
    "recovery.steps=3",
    "recovery.tokens=512",
    "calibration.tokens=128",
    "evaluation.tokens=128",
    "evaluation.speed=false",
    "training.precision=fp32",
)


DOWN = "model.layers.0.mlp.down_proj.weight"


class _KilledError(BaseException):
    """Like a signal: nothing in the library catches it."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = write_letters(tmp_path)
    sources = [f"{section}.text={text}" for section in ("calibration", "recovery", "evaluation")]
    windows = [f"{section}.window=16" for section in ("calibration", "recovery", "evaluation")]
    return load_recipe(None, [*SETTINGS, *sources, *windows])


def _killed(*_: Any, **__: Any) -> None:
    raise _KilledError


def _kill_in(name: str, patch: pytest.MonkeyPatch) -> None:
    """Have the stage ``name`` die as it begins."""
    assert name in {stage.name for stage in STAGES}
    stages = tuple(replace(stage, make=_killed) if stage.name == name else stage for stage in STAGES)
    patch.setattr(order, "STAGES", stages)


def _run(recipe: Recipe, output: Path, resume: bool = False) -> Any:
    return pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe, output=output, resume=resume)


@pytest.mark.parametrize("dies_in", ["baseline", "decide", "cut", "pruned", "recovery", "recovered", "save"])
def test_killed_in_any_stage_and_resumed_it_ends_like_the_undisturbed_run(
    dies_in: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _kill_in(dies_in, patch)
        with pytest.raises(_KilledError):
            _run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    resumed = _run(recipe, tmp_path / "out", resume=True)
    assert resumed.plan == whole.plan
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"letters.txt", "whole", "out"}
    seen = json.loads((tmp_path / "out" / "secateur" / "metrics.json").read_text())
    assert seen["recovered"] == json.loads((tmp_path / "whole" / "secateur" / "metrics.json").read_text())["recovered"]


def test_a_run_within_a_time_keeps_its_amounts_when_it_is_resumed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has another speed by then; a finished run is known, too."""
    given = {"effort.within": "10m", "recovery.repair": False}
    limited = revise(recipe_of(_without(recipe, "recovery.steps", "recovery.tokens")), given)
    monkeypatch.setattr(sizing, "measure_speed", lambda *_: sizing.Pace(0.05, 0.1))
    with monkeypatch.context() as patch:
        _kill_in("recovery", patch)
        with pytest.raises(_KilledError):
            _run(limited, tmp_path / "out")
    monkeypatch.setattr(sizing, "measure_speed", _killed)
    resumed = _run(limited, tmp_path / "out", resume=True)
    assert resumed.recipe.recovery.steps >= 10
    assert not resumed.recipe.effort.given
    asked = revise(limited, {"model.name": resumed.recipe.model.name})
    assert pipeline.finished(asked, tmp_path / "out") is not None
    assert pipeline.finished(revise(asked, {"seed": 5}), tmp_path / "out") is None


def test_on_a_gpu_a_run_has_a_time_by_default_and_is_known_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed where there is no GPU, it keeps its amounts; other steps are another run."""
    tree = _without(recipe, "recovery.steps", "recovery.tokens") | {"method": "magnitude"}
    default = revise(recipe_of(tree), {"recovery.repair": False})
    said: list[str] = []
    monkeypatch.setattr(pipeline, "say", said.append)
    monkeypatch.setattr(sizing, "measure_speed", lambda *_: sizing.Pace(0.5, 2.0))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "effort_for", lambda recipe, on_cpu, runs: sizing.effort_for(recipe, on_cpu=False))
        _kill_in("recovery", patch)
        with pytest.raises(_KilledError):
            _run(default, tmp_path / "out")
    assert any("30m by default" in line for line in said)
    resumed = _run(default, tmp_path / "out", resume=True)
    steps = resumed.recipe.recovery.steps
    assert 10 <= steps != Recipe().recovery.steps
    metrics = json.loads((tmp_path / "out" / "secateur" / "metrics.json").read_text())
    assert metrics["effort"] == {"within": "30m"}
    asked = revise(default, {"model.name": resumed.recipe.model.name})
    assert pipeline.finished(asked, tmp_path / "out") is not None
    assert pipeline.finished(revise(asked, {"recovery.steps": steps + 1}), tmp_path / "out") is None
    assert not any("Twice" in line for line in said), "an interrupted recovery is not timed whole"


def test_a_run_says_once_what_more_steps_take(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pipeline, "say", said.append)
    quick = revise(recipe_of(_without(recipe) | {"method": "magnitude"}), {"recovery.repair": False})
    found = _run(quick, tmp_path / "out")
    [line] = [line for line in said if "Twice" in line]
    assert line.startswith("3 steps of recovery (48 tokens) took ")
    assert line.endswith(" more: --set recovery.steps=6")
    before, after = (list(found.metrics[state]["perplexity"].values()) for state in ("pruned", "recovered"))
    assert f"perplexity {before[0]:.1f} → {after[0]:.1f}." in line
    assert pipeline.finished(revise(quick, {"model.name": found.recipe.model.name}), tmp_path / "out") is not None
    without = revise(quick, {"recovery.steps": 0})
    said.clear()
    _run(without, tmp_path / "none")
    assert not any("Twice" in line for line in said)


def _without(recipe: Recipe, *keys: str) -> dict[str, Any]:
    """The keys that a recipe sets, without these."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for key in keys:
        section, _, name = key.partition(".")
        tree[section].pop(name, None)
    return tree


def test_a_teacher_is_let_go_once_recovery_has_what_it_needs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = revise(recipe, {"recovery.teacher": 0.5})
    with monkeypatch.context() as patch:
        _kill_in("recovered", patch)
        with pytest.raises(_KilledError):
            _run(taught, tmp_path / "out")
    assert _run(taught, tmp_path / "out", resume=True).teacher is None


@pytest.mark.parametrize("damage", ["", "null", '{"dense": {'])
def test_numbers_that_are_damaged_are_made_again_all_of_them(
    damage: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _kill_in("save", patch)
        with pytest.raises(_KilledError):
            _run(recipe, tmp_path / "out")
    (tmp_path / ".out.secateur" / "metrics.json").write_text(damage)
    resumed = _run(recipe, tmp_path / "out", resume=True)
    assert resumed.metrics.keys() == whole.metrics.keys()
    assert resumed.metrics["method"] == whole.metrics["method"]
    for key, value in whole.metrics["recovery"]["log"][-1].items():
        assert resumed.metrics["recovery"]["log"][-1][key] == pytest.approx(value, abs=1e-6)


class _Scales(Method):
    """Reads text only, and leaves other weights: a quarter less of every down projection."""

    name, summary, needs, changes_weights = "scales", "scales what it keeps", "text", True

    def run(self, task: PruningTask) -> Decision:
        with torch.no_grad():
            for path, weight in task.model.named_parameters():
                if path.endswith("down_proj.weight"):
                    weight.mul_(0.75)
        scores = task.score(CRITERIA["magnitude"]())
        return Decision(task.allocate(scores), scores)


@pytest.mark.parametrize("method", [_Scales, FLAP])
def test_what_a_one_shot_method_changed_survives_a_kill_after_it_decided(
    method: type[Method], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, method.name, method)
    monkeypatch.setattr(making, "save", lambda *_: None)
    recipe = revise(recipe, {"method": method.name, "recovery.steps": 0})
    whole = pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe)
    with monkeypatch.context() as patch:
        _kill_in("cut", patch)
        with pytest.raises(_KilledError):
            _run(recipe, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(method, "run", _killed)  # what it decided is kept
        resumed = _run(recipe, tmp_path / "out", resume=True)
    assert resumed.plan == whole.plan
    assert resumed.scores.on_one_scale == (method is FLAP)
    plain = pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=revise(recipe, {"method": "magnitude"}))
    weights, others = whole.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(resumed.model.state_dict()[name], value) for name, value in weights.items())
    assert weights.keys() > others.keys() or not torch.equal(weights[DOWN], others[DOWN])


@pytest.mark.parametrize(
    ("damaged", "bytes_left", "again"),
    [
        ("", 0, []),
        ("repaired", 50, ["compensate", "reconstruct"]),
        ("repaired", None, ["compensate", "reconstruct"]),
        ("reconstructed", 50, ["reconstruct"]),
    ],
)
def test_new_weights_of_a_finished_stage_are_not_computed_again(
    damaged: str,
    bytes_left: int | None,
    again: list[str],
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless their file is damaged, or is not there."""
    called: list[str] = []

    def made(name: str, factor: float, kind: Any) -> Any:
        def make(model: Any, *_: Any, start: Any, **__: Any) -> Any:
            called.append(name)
            return kind(
                {DOWN: factor * start.get(DOWN, model.get_parameter(DOWN).detach())}, loss_before=1.0, loss_after=0.5
            )

        return make

    monkeypatch.setattr(making, "compensate", made("compensate", 0.75, Compensated))
    monkeypatch.setattr(making, "save", lambda *_: None)
    monkeypatch.setattr(making, "reconstruct", made("reconstruct", 0.5, Reconstructed))
    recipe = revise(recipe, {"method": "magnitude", "recovery.repair": True, "recovery.reconstruct": True})
    whole = pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=recipe)
    with monkeypatch.context() as patch:
        _kill_in("recovery", patch)
        with pytest.raises(_KilledError):
            _run(recipe, tmp_path / "out")
    assert called == 2 * ["compensate", "reconstruct"]
    called.clear()
    if damaged:
        file = tmp_path / ".out.secateur" / f"{damaged}.safetensors"
        data = file.read_bytes()
        file.unlink()
        if bytes_left is not None:
            file.write_bytes(data[:bytes_left])
    resumed = _run(recipe, tmp_path / "out", resume=True)
    assert called == again
    assert resumed.metrics["repair"] == whole.metrics["repair"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_method_that_changes_weights_is_no_baseline_and_flap_as_one_leaves_no_bias(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "scales", _Scales)
    with pytest.raises(InputError, match=r"changes no weights \(random, magnitude"):
        revise(recipe, {"evaluation.baseline": "scales"})
    recipe = revise(recipe, {"recovery.steps": 0})
    weights, measured = [], []
    for baseline in ("flap", None):
        result = pipeline.prune(
            TINY["llama-gqa"](), tiny_tokenizer(), recipe=revise(recipe, {"evaluation.baseline": baseline})
        )
        weights.append(result.model.state_dict())
        measured.append(result.metrics.get("baseline", {}).get("perplexity"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    alone = pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=revise(recipe, {"method": "flap"}))
    assert measured[0] == pytest.approx(alone.metrics["pruned"]["perplexity"], rel=1e-4)


def test_updates_that_a_method_did_not_declare_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(_Scales):
        changes_weights = False

        def run(self, task: PruningTask) -> Decision:
            return Decision({}, updates={DOWN: torch.zeros_like(task.model.get_parameter(DOWN))})

    monkeypatch.setitem(METHODS, "scales", Silent)
    with pytest.raises(ModelError, match="compensates"):
        pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=revise(recipe, {"method": "scales"}))
    monkeypatch.setitem(METHODS, "scales", object)
    with pytest.raises(InputError, match=r"subclass of secateur\.methods\.base\.Method"):
        revise(recipe, {"method": "scales"})


def test_a_run_is_not_resumed_with_weights_or_text_that_are_others_by_then(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise _KilledError

    recipe = revise(recipe, {"method": "taylor", "recovery.steps": 0})
    whole = _run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _kill_in("cut", patch)
        with pytest.raises(_KilledError):
            _run(recipe, tmp_path / "out")
    model = TINY["llama-gqa"]()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)  # as a fine-tune in the same folder might
    with pytest.raises(InputError, match=r"Changed since: the model's weights\. Put back"):
        pipeline.prune(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out", resume=True)
    text = tmp_path / "letters.txt"
    before = text.read_text()
    text.write_text(before.replace("letter", "parcel"))
    with pytest.raises(
        InputError,
        match=r"Changed since: the text of calibration, the text of repair, the text of evaluation\. Put back",
    ):
        _run(recipe, tmp_path / "out", resume=True)
    text.write_text(before)
    assert _run(recipe, tmp_path / "out", resume=True).plan == whole.plan


def test_a_model_whose_training_was_interrupted_still_has_adapters_and_that_is_said(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise _KilledError

    model = TINY["llama-gqa"]()
    with monkeypatch.context() as patch:
        patch.setattr(Shrinking, "after_step", killed)
        with pytest.raises(_KilledError):
            pipeline.prune(model, tiny_tokenizer(), recipe=recipe)
    for call in (pipeline.prune, inspection.analyze):
        with pytest.raises(
            InputError, match=r"14 modules .*carry adapters.*layers\.0\.self_attn.*Load the model again"
        ):
            call(model, tiny_tokenizer(), recipe=recipe)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_in_8_or_4_bits_is_refused_as_such(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = TINY["llama-gqa"]()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = (bnb.nn.Int8Params if bits == 8 else bnb.nn.Params4bit)(linear.weight.data, requires_grad=False)
    for call in (pipeline.prune, inspection.analyze):
        with pytest.raises(InputError, match=r"1 weights .*bitsandbytes .*layers\.1\.mlp\.up_proj.*Load it in float32"):
            call(model, tiny_tokenizer())


def test_only_groups_that_the_budget_may_cut_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pipeline, "say", said.append)
    recipe = load_recipe(None, ["budget.kinds=[ffn]", "recovery.steps=0", "method=magnitude"])
    pipeline.prune(TINY["llama-gqa"](), recipe=recipe, dry_run=True)
    assert said[-1].startswith("Found 2 node groups")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "qwen2", "phi3"])
def test_a_data_free_method_needs_no_tokenizer_and_works_in_place(name: str) -> None:
    model = TINY[name]()
    dense = copy.deepcopy(model)
    result = secateur.prune(model, ratio=0.2, method="magnitude")
    assert result.model is model
    assert sum(p.numel() for p in model.parameters()) == result.plan.parameters_after
    again = secateur.apply_plan(result.plan, dense)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(PlanError, match="another model"):
        secateur.apply_plan(result.plan, again)
    secateur.prune(again, ratio=0.1, method="random")  # it describes itself, so that a second round can start from it


def test_an_edited_plan_is_counted_anew(tmp_path: Path) -> None:
    result = secateur.prune(TINY["llama-gqa"](), ratio=0.2, method="magnitude")
    dense = result.plan.parameters_before
    edited = result.plan.model_copy(update={"kept": {}, "sizes": {}})
    TINY["llama-gqa"]().save_pretrained(tmp_path / "model")
    recipe = load_recipe(None, [], {"model.name": str(tmp_path / "model")})
    applied = pipeline.apply(edited, recipe, tmp_path / "out")
    assert (applied.plan.parameters_after, applied.plan.ratio_reached) == (dense, 0.0)
    assert json.loads((tmp_path / "out" / "secateur" / "plan.json").read_text())["parameters_after"] == dense


def test_a_result_of_another_cut_is_not_saved(tmp_path: Path) -> None:
    result = secateur.prune(TINY["llama-gqa"](), ratio=0.2, method="magnitude")
    secateur.prune(result.model, ratio=0.1, method="magnitude")
    with pytest.raises(InputError, match="latest result"):
        secateur.save(result, tmp_path / "out")


def test_new_biases_are_counted(recipe: Recipe) -> None:
    flap = revise(recipe, {"method": "flap", "recovery.steps": 0})
    result = pipeline.prune(TINY["llama-gqa"](), tiny_tokenizer(), recipe=flap)
    assert result.plan.parameters_after == sum(p.numel() for p in result.model.parameters())


def test_a_method_that_reads_text_says_so_when_there_is_no_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        secateur.prune(TINY["llama-gqa"](), method="wanda")


def test_a_dry_run_changes_nothing_and_finds_what_cannot_be_reached(recipe: Recipe, tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    before = copy.deepcopy(model.state_dict())
    result = pipeline.prune(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out", dry_run=True)
    assert 0.15 < result.plan.ratio_reached < 0.25
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt"}
    with pytest.raises(PlanError, match="cannot be reached"):
        pipeline.prune(model, tiny_tokenizer(), recipe=recipe, ratio=0.95, dry_run=True)


def test_what_was_pruned_can_be_pruned_again_and_saved(tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    first = secateur.prune(model, ratio=0.1, method="random")
    second = secateur.prune(model, ratio=0.1, method="magnitude")
    assert second.plan.parameters_before == first.plan.parameters_after > second.plan.parameters_after
    secateur.save(second, tmp_path / "twice")
    opened, _ = secateur.load(str(tmp_path / "twice"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits)

"""Methods and criteria by name: the built-in ones, and classes of the user's own as ``package.module:Class``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import inspection
from secateur.config import dump, load_recipe
from secateur.errors import InputError, SecateurError
from secateur.graph import trace
from secateur.importance import criterion_class
from secateur.methods import METHODS, Decision, PruningTask, method_class, method_source
from secateur.methods.saliency import Saliency
from secateur.stages import making
from secateur.testing.tiny import build
from secateur.types import Cut

OWN = """
import torch
from secateur.importance import Criterion
from secateur.methods import Decision, Method
from secateur.types import Scores

class First(Criterion):
    name = "first"
    reverse: bool = False

    def score(self, model, graph, calibration, seed):
        sign = -1 if self.reverse else 1
        return Scores({group.name: sign * torch.arange(group.size).float() for group in graph.prunable})

class ReadsAdapters(First):
    needs = "adapters"

class Last(Method):
    name, summary = "last", "the last units"

    def run(self, task):
        return Decision(task.allocate(task.score(First(reverse=True))))

class Nameless(Criterion):
    def score(self, model, graph, calibration, seed):
        return Scores({})

class Demanding(First):
    share: float

class Changes(Last):
    changes_weights = True

class Half(Method):
    name, summary = "half", "without run"

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_plugin.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_plugin", raising=False)
    return "own_plugin"


def test_a_built_in_name_is_its_row() -> None:
    assert method_class("taylor") is METHODS["taylor"]


def test_a_method_and_a_criterion_of_ones_own_cut(own: str) -> None:
    kept = {}
    for name in ("First", "Last"):
        plan = secateur.prune(build("llama-gqa"), ratio=0.1, method=f"{own}:{name}").plan
        assert plan.method == f"{own}:{name}"
        [kept[name]] = [units for group, units in plan.kept.items() if group == "layers.0.mlp"]
    assert kept["First"][-1] == 39
    assert kept["Last"][0] == 0
    assert kept["First"] != kept["Last"]


def test_settings_of_ones_own_are_read_and_written(own: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, ["method.reverse=true"], {"method": f"{own}:First"})
    assert recipe.method.settings.model_dump() == {"reverse": True}
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(InputError, match=r"method\.backwards.*reverse"):
        load_recipe(None, ["method.backwards=true"], {"method": f"{own}:First"})


def test_saliency_takes_options_and_classes_of_ones_own(own: str) -> None:
    saliency = Saliency({"fisher": 1, f"{own}:First": {"weight": 0.5, "reverse": True}, "taylor": {"form": "vector"}})
    assert saliency.weights == {"fisher": 1.0, f"{own}:First": 0.5, "taylor": 1.0}
    assert saliency.criteria["taylor"].model_dump() == {"form": "vector"}
    recipe = load_recipe(None, ["method=lorashear", "method.saliency={taylor: {weight: 0.5, form: vector}}"])
    assert load_recipe(None, ["method=lorashear", f"method.saliency={recipe.method.settings.saliency}"]) == recipe


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        ("{taylr: 1}", "did you mean taylor"),
        ("{taylor: 0}", "positive"),
        ("{taylor: {weight: -1}}", "positive"),
        ("{taylor: {weight: true}}", "positive"),
        ("{taylor: {weight: .inf}}", "finite"),
        (f"{{taylor: {{weight: 1{'0' * 400}}}}}", "finite"),
        ("{taylor: {shape: round}}", "shape"),
        ("{taylor: {form: round}}", "form"),
        ("{taylor: many}", "saliency"),
        ("{}", "saliency"),
    ],
)
def test_a_saliency_that_cannot_be_is_refused_by_name(saliency: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(None, ["method=lorashear", f"method.saliency={saliency}"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tailor", r"Unknown method tailor \(did you mean taylor\?\)"),
        ("no_such_module_here:Class", "cannot be imported.*PYTHONPATH"),
        ("own_plugin:Missing", "has no Missing"),
        ("own_plugin:Other", "no method.*secateur.methods"),
        ("own_plugin:ReadsAdapters", "method.saliency"),
        ("own_plugin:", "package.module:Class"),
        (":First", "package.module:Class"),
        ("own plugin:First", "package.module:Class"),
        ("../own_plugin:First", "package.module:Class"),
        ("broken_plugin:First", "cannot be imported: ValueError: of its own"),
        ("script_plugin:First", "cannot be imported: SystemExit: 0"),
        ("sys:First", r"module sys \(built in\) has no First"),
        ("own_plugin:Nameless", "lacks name"),
        ("own_plugin:Half", "lacks run"),
        ("secateur.importance:Criterion", "lacks score, name"),
    ],
)
def test_a_name_that_cannot_be_is_refused(own: str, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise ValueError('of its own')")
    (tmp_path / "script_plugin.py").write_text("raise SystemExit(0)")
    with pytest.raises(InputError, match=message):
        load_recipe(None, [], {"method": name})


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision({"layers.7.mlp": [0]}), "layers.7.mlp.*has none"),
        (Decision({"layers.0.mlp": [0, 40]}), "Unit 40 of layers.0.mlp.*0 to 39"),
        (Decision({"layers.0.mlp": [-1]}), "Unit -1 of layers.0.mlp"),
        (Decision({"layers.0.mlp": torch.tensor([0.5])}), "no list of whole numbers"),
        (Decision([]), "no mapping of groups"),  # type: ignore[arg-type]
        (Decision({}, {"layers.0.mlp": torch.zeros(40)}), "neither Scores nor None"),  # type: ignore[arg-type]
        (Decision({}, metrics={"loss": torch.zeros(1)}), "JSON does not support"),
        (Decision({}, metrics={"steps": [{1: 2}]}), "JSON does not support"),
        (None, "answers with None, and not with a Decision"),
    ],
)
def test_a_method_whose_answer_is_no_decision_about_this_model_is_refused(
    decision: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(METHODS["random"]):  # type: ignore[misc]
        def run(self, task: PruningTask) -> Decision:
            return decision  # type: ignore[no-any-return]

    monkeypatch.setitem(METHODS, "wrong", Wrong)
    with pytest.raises(SecateurError, match=message):
        secateur.prune(build("llama-gqa"), ratio=0.1, method="wrong")


def test_units_may_be_a_tensor() -> None:
    graph = trace(build("llama-gqa"))
    assert Cut.removing(graph, {"layers.0.mlp": torch.tensor([3, 1])}).removed == {"layers.0.mlp": [1, 3]}


def test_a_criterion_is_asked_by_its_defaults_and_one_without_is_refused(own: str) -> None:
    with pytest.raises(InputError, match=r"criterion\.share: field required"):
        inspection.analyze(build("llama-gqa"), None, criterion=f"{own}:Demanding")


@pytest.mark.parametrize("method", ["{own}:First", {"name": "lorashear", "saliency": {"taylor": 1, "{own}:First": 1}}])
def test_a_method_is_known_by_the_files_of_the_classes_of_ones_own(own: str, tmp_path: Path, method: Any) -> None:
    chosen = load_recipe(flags={"method": json.loads(json.dumps(method).replace("{own}", own))}).method
    before = method_source(chosen.name, chosen.settings.model_dump())
    assert before == method_source(chosen.name, chosen.settings.model_dump()) != ""
    (tmp_path / "own_plugin.py").write_text(OWN.replace("-1 if", "-2 if"))
    assert method_source(chosen.name, chosen.settings.model_dump()) != before
    assert method_source("lorashear", {"saliency": {"taylor": 1.0}}) == ""


def test_an_unfinished_run_does_not_go_on_with_a_class_that_has_changed(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "cut", fails)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(build("llama-gqa"), ratio=0.1, method=f"{own}:First", output=tmp_path / "out")
    (tmp_path / "own_plugin.py").write_text(OWN.replace("-1 if", "-2 if"))
    with pytest.raises(InputError, match="Changed since: the files of your own classes"):
        secateur.prune(build("llama-gqa"), ratio=0.1, method=f"{own}:First", output=tmp_path / "out", resume=True)
    (tmp_path / "own_plugin.py").write_text(OWN)
    secateur.prune(build("llama-gqa"), ratio=0.1, method=f"{own}:First", output=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_baseline_may_be_of_ones_own(own: str) -> None:
    assert load_recipe(None, ["method=lorashear", f"evaluation.baseline={own}:First"]).baseline == f"{own}:First"
    for wrong, message in (("Demanding", r"evaluation\.baseline\.share: field required"), ("Changes", "no weights")):
        with pytest.raises(InputError, match=message):
            load_recipe(None, [f"evaluation.baseline={own}:{wrong}"])


def test_a_method_is_no_criterion(own: str) -> None:
    with pytest.raises(InputError, match="no criterion"):
        criterion_class(f"{own}:Last")
    assert criterion_class(f"{own}:First").name == "first"

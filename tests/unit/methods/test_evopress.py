"""EvoPress: the contract, better parents only, the KL that judges, and the same end after a kill."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compensation import Database
from secateur.errors import DataError, InputError, ModelError
from secateur.evaluation import Divergence
from secateur.methods import METHODS, Decision, PruningTask
from secateur.methods import evopress as module
from secateur.methods.evopress import EvoPress, EvoPressSettings
from secateur.surgery import masked, updated
from secateur.surgery.updates import Updates
from secateur.testing.method_contract import MethodContract
from secateur.types import Cut

SETTINGS = EvoPressSettings(generations=4, children=(5, 2), windows=(1, 3), saliency={"magnitude": 1.0})


COMPENSATED = SETTINGS.model_copy(update={"compensated": True})


class EvoPressContract(MethodContract):
    method = EvoPress
    settings = SETTINGS
    # its first candidates are alternatives
    test_every_choice_on_the_way_only_shrinks = None  # type: ignore[assignment]


class TestEvoPress(EvoPressContract):
    pass


class TestEvoPressOfAMixture(EvoPressContract):
    family = "mixtral"

    def test_the_budget_is_obeyed(self) -> None:
        task = self.task(0.1, protect=("layers.0.*",), kinds=("ffn",))
        assert set(self.decide(task).removed) == {"layers.1.mlp.experts"}


class TestEvoPressUnderANormOverHeads(EvoPressContract):
    family = "olmo2"


class TestEvoPressWithADatabase(EvoPressContract):
    family = "qwen2"
    settings = COMPENSATED


class OfThreeLayers(EvoPressContract):
    family = "llama-odd"


def run(ratio: float = 0.3, generations: int = 8, **budget: Any) -> tuple[PruningTask, Decision]:
    task = OfThreeLayers().task(ratio, **{"floor": 0, **budget})
    return task, EvoPress(SETTINGS.model_copy(update={"generations": generations})).run(task)


def kl(task: PruningTask, removed: dict[str, list[int]], rows: list[int], weights: Updates | None = None) -> float:
    """By the plain formula."""
    assert task.calibration is not None
    ids = task.calibration.ids[rows]
    with torch.no_grad():
        dense = task.model(ids).logits[:, :-1].log_softmax(-1)
        with updated(task.model, weights or {}), masked(task.model, task.graph, Cut.removing(task.graph, removed)):
            found = task.model(ids).logits[:, :-1].log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum(-1).mean())


def test_the_winner_is_nearer_to_the_dense_model_on_text_that_every_generation_reads() -> None:
    task = OfThreeLayers().task(0.3, floor=0)
    decision = EvoPress(SETTINGS.model_copy(update={"generations": 8, "windows": (1, 6)})).run(task)
    ranked = METHODS["magnitude"]().run(OfThreeLayers().task(0.3, floor=0)).removed
    every = list(range(6))
    assert decision.metrics["improved"] > 0
    assert decision.metrics["kl_after"] == pytest.approx(kl(task, decision.removed, every), abs=1e-4)
    assert decision.metrics["kl_after"] < decision.metrics["kl_before"]
    assert kl(task, decision.removed, every) < kl(task, ranked, every)


def test_the_result_is_never_worse_than_the_start_on_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of single generations mislead this search as much as they can."""
    measure = module._Judge.kl
    monkeypatch.setattr(
        module._Judge, "kl", lambda self, levels, rows: measure(self, levels, rows) * (1 if len(rows) == 6 else -1)
    )
    task, decision = run()
    starts = [METHODS["magnitude"]().run(OfThreeLayers().task(0.3, floor=floor)).removed for floor in (0, 1)]
    assert decision.metrics["improved"] > 0
    assert decision.removed in starts
    assert decision.metrics["kl_after"] == decision.metrics["kl_before"]
    assert decision.metrics["kl_after"] == pytest.approx(kl(task, decision.removed, list(range(6))), abs=1e-4)


def test_a_child_replaces_the_parent_only_if_it_is_better_on_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent is measured on the last stage's windows in every generation, and wins unless a child is below it."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
    measure = module._Judge.kl

    def watched(self: Any, levels: Any, rows: Any) -> float:
        found = measure(self, levels, rows)
        seen.append((levels, tuple(rows), found))
        return found

    kept: list[module.State] = []
    monkeypatch.setattr(module._Judge, "kl", watched)
    monkeypatch.setattr(module.Lineage, "keep", lambda self, state: kept.append(state))
    task, _ = run(generations=6)
    assert task.calibration is not None
    for number, (before, after) in enumerate(pairwise(kept), start=1):
        rows = tuple(task.calibration.turn_rows(number, 3))
        on_all = {levels: value for levels, read, value in seen if read == rows}
        assert on_all[before.parent] >= on_all[after.parent]
        assert after.kl == on_all[after.parent]
        assert (after.parent != before.parent) == (after.improved > before.improved)


def test_fewer_candidates_read_more_text_from_stage_to_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[int, int]] = []
    ranked = module._Judge.ranked

    def watched(self: Any, candidates: Any, rows: Any) -> Any:
        candidates = list(candidates)
        stages.append((len(candidates), len(rows)))
        return ranked(self, candidates, rows)

    monkeypatch.setattr(module._Judge, "ranked", watched)
    run(generations=1)
    assert [windows for _, windows in stages] == [3, 1, 3], "the starts, then two stages"
    assert 2 <= stages[1][0] <= 5
    assert stages[2][0] == 2


def test_whole_layers_are_searched_by_which_and_not_by_how_many() -> None:
    task = OfThreeLayers().task(0.2, kinds=("layer",), floor=0)
    settings = SETTINGS.model_copy(update={"generations": 6, "windows": (1, 6), "children": (6, 2)})
    decision = EvoPress(settings).run(task)
    [(name, units)] = decision.removed.items()
    assert len(units) == 1
    every = list(range(6))
    single = {unit: kl(task, {name: [unit]}, every) for unit in range(3) if unit in task.graph[name].movable}
    assert units == [min(single, key=lambda unit: single[unit])]


def test_experts_are_searched() -> None:
    task = TestEvoPressOfAMixture().task(0.2, kinds=("expert",), floor=0)
    decision = EvoPress(SETTINGS).run(task)
    assert {task.graph[name].kind for name in decision.removed} == {"expert"}


def test_one_group_has_nothing_to_exchange() -> None:
    _, decision = run(0.05, protect=("layers.[01].*",), kinds=("ffn",))
    assert decision.metrics["improved"] == 0


def compensated(task: PruningTask) -> Decision:
    return EvoPress(COMPENSATED.model_copy(update={"generations": 3})).run(task)


def test_candidates_are_judged_with_the_units_and_weights_of_the_database() -> None:
    task = OfThreeLayers().task(0.3, floor=0)
    decision = compensated(task)
    deepest = {group.name: group.size - 1 for group in task.graph.prunable}
    database = Database(task.model, task.graph, deepest, None)
    database.build(task.calibration, "method.compensated")
    counts = {name: len(units) for name, units in decision.removed.items()}
    assert decision.removed == {name: sorted(database.orders[name][:count]) for name, count in counts.items()}
    every = list(range(6))
    found = kl(task, decision.removed, every, database.weights(counts))
    assert decision.metrics["kl_after"] == pytest.approx(found, abs=1e-4)
    assert found < kl(task, decision.removed, every)
    assert not decision.updates, "repair compensates for the winner"


def test_compensated_candidates_keep_legal_counts() -> None:
    task = OfThreeLayers().task(0.3, floor=0.5, round_to={"ffn": 4})
    removed = compensated(task).removed
    for name, units in removed.items():
        group = task.graph[name]
        assert group.kind != "ffn" or (group.size - len(units)) % 4 == 0
    equal = compensated(OfThreeLayers().task(0.2, runs_on="everywhere", kinds=("ffn",))).removed
    assert len({len(units) for units in equal.values()}) == 1
    shares = OfThreeLayers().task(0.2, floor=0, shares={"attention": 0.0})
    assert {shares.graph[name].kind for name in compensated(shares).removed} == {"ffn"}


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("damaged", ["", "parent.json", "start.safetensors"])
def test_a_killed_run_goes_on_to_the_same_answer(damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = run()
    task = OfThreeLayers().task(0.3, floor=0)
    task.work = tmp_path / "method"
    kept: list[int] = []
    keep = module.Lineage.keep

    def killed(self: module.Lineage, state: module.State) -> None:
        if len(kept) == 5:
            raise KilledError
        kept.append(state.done)
        keep(self, state)

    monkeypatch.setattr(module.Lineage, "keep", killed)
    settings = SETTINGS.model_copy(update={"generations": 8})
    with pytest.raises(KilledError):
        EvoPress(settings).run(task)
    if damaged:
        file = tmp_path / "method" / damaged
        file.write_bytes(file.read_bytes()[:20])
    again: list[int] = []
    monkeypatch.setattr(module.Lineage, "keep", lambda self, state: (again.append(state.done), keep(self, state)))
    found = EvoPress(settings).run(task)
    assert again == list(range(1 if damaged == "parent.json" else 6, 9))
    assert found.removed == expected.removed
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("killed_in", ["the database", "the search"])
def test_a_killed_run_with_a_database_goes_on_to_the_same_answer(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compensated(OfThreeLayers().task(0.3, floor=0))
    task = OfThreeLayers().task(0.3, floor=0)
    task.work = tmp_path / "method"
    owner, name = (Database, "_keep") if killed_in == "the database" else (module.Lineage, "keep")
    keep, kept = getattr(owner, name), list[Any]()

    def killed(*args: Any) -> None:
        if len(kept) == 2:
            raise KilledError
        kept.append(args[1])
        keep(*args)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(KilledError):
        compensated(task)
    again: list[int] = []
    monkeypatch.setattr(owner, name, keep)
    monkeypatch.setattr(
        Database,
        "_keep",
        lambda self, layer, tensors, keep=Database._keep: (again.append(layer), keep(self, layer, tensors)),
    )
    found = compensated(task)
    assert again == ([2] if killed_in == "the database" else [])
    assert found.removed == expected.removed
    assert found.metrics == expected.metrics


def test_another_seed_searches_elsewhere() -> None:
    found = [EvoPress(SETTINGS).run(OfThreeLayers().task(0.3, seed=seed)) for seed in range(3)]
    assert len({str(decision.metrics) for decision in found}) > 1


def test_a_model_that_gives_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Divergence, "of", lambda *_: float("inf"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        EvoPress(SETTINGS).run(TestEvoPress().task())


def test_what_it_cannot_do_is_refused_early() -> None:
    with pytest.raises(InputError, match="trains no adapters"):
        EvoPress(EvoPressSettings(saliency={"lora": 1.0})).check(TestEvoPress().task())
    with pytest.raises(InputError, match="Leave vocab out"):
        EvoPress(SETTINGS).check(TestEvoPress().task(kinds=("vocab",)))
    for task in (TestEvoPressOfAMixture().task(0.1), TestEvoPress().task(kinds=("ffn", "layer"))):
        EvoPress(SETTINGS).check(task)
        with pytest.raises(ModelError, match=r"needs one linear that consumes|method\.compensated=false"):
            EvoPress(COMPENSATED).check(task)
    task = TestEvoPress().task()
    task.calibration = None
    with pytest.raises(DataError, match="'evopress' reads text"):
        EvoPress(SETTINGS).run(task)


@pytest.mark.parametrize(
    ("children", "windows"), [((8, 2), (1,)), ((2, 8), (1, 4)), ((8, 2), (4, 1)), ((), ()), ((0,), (1,))]
)
def test_stages_that_make_no_sense_are_refused(children: tuple[int, ...], windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"stage|at least 1|greater"):
        EvoPressSettings(children=children, windows=windows)

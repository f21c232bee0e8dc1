"""The loop of periods without LoRAShear: a transfer by a penalty, in a few lines (as in DReSS, arXiv 2501.17905)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerControl, TrainerState

from secateur.graph import trace
from secateur.methods import Decision, Method, PruningTask
from secateur.methods.base import MethodNeeds
from secateur.methods.periods import Period, Periods, PeriodSettings
from secateur.methods.saliency import Saliency
from secateur.methods.transfer import Transfer
from secateur.planning import Budget
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.training import TrainingSettings
from secateur.types import DependencyGraph, Settings
from secateur.units import rows_of
from secateur.walk import Calibration


class Lasso(Transfer):
    """A group lasso on the units that go in this period."""

    def __init__(self, graph: DependencyGraph, period: Period, *, weight: float = 1.0) -> None:
        self.graph, self.units, self.weight = graph, period.redundant, weight

    def penalty(self, model: Any, step: int) -> torch.Tensor | None:
        norms = [unit_norms(model, self.graph, name, units) for name, units in self.units.items() if units]
        return self.weight * torch.cat(norms).sum() if norms else None


def unit_norms(model: Any, graph: DependencyGraph, name: str, units: list[int]) -> torch.Tensor:
    """Norm of everything that produces each of these units."""
    return torch.cat([rows.effective() for rows in rows_of(model, graph[name], units, "out")], dim=1).norm(dim=1)


class DReSS(Method):
    name, summary = "dress", "progressive: a group lasso on the units that go"
    needs: ClassVar[MethodNeeds] = "training"
    changes_weights = True
    Settings: ClassVar[type[Settings]] = PeriodSettings
    weight = 1.0

    def run(self, task: PruningTask) -> Decision:
        return Periods(task, self.settings, Saliency({"magnitude": 1.0}), partial(Lasso, weight=self.weight)).run()


class Unpenalised(DReSS):
    weight = 0.0


SETTINGS = PeriodSettings(periods=2, period_steps=4, warmup_steps=1)


def task(family: str = "llama-gqa", **changes: Any) -> PruningTask:
    model = build(family)
    training = TrainingSettings(precision="fp32", learning_rate=5e-2, warmup=0.0, checkpoint_steps=2)
    options: dict[str, Any] = {"calibration": Calibration(noise(4, 1)), "training_blocks": noise(16, 2)}
    return PruningTask(model, None, trace(model), Budget(ratio=0.2), **{**options, "training": training, **changes})


def mean_norm(given: PruningTask, units: dict[str, list[int]]) -> float:
    with torch.no_grad():
        found = [unit_norms(given.model, given.graph, name, of) for name, of in units.items()]
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_a_penalty_shrinks_the_units_that_go_and_is_logged_by_name(family: str) -> None:
    entries: list[Any] = []
    given, plain = task(family, log=entries.append), task(family)
    decision, _ = DReSS(SETTINGS).run(given), Unpenalised(SETTINGS).run(plain)
    assert mean_norm(given, decision.removed) < 0.95 * mean_norm(task(family), decision.removed)
    assert mean_norm(given, decision.removed) < 0.95 * mean_norm(plain, decision.removed)
    assert entries == decision.metrics["training"]
    assert ["penalty" in entry for entry in entries] == [entry["stage"] != "warming up" for entry in entries]
    assert all(entry["penalty"] > 0 for entry in entries if "penalty" in entry)
    parameters = dict(given.model.named_parameters())
    for name, units in decision.removed.items():  # nothing consumes them
        for member in given.graph[name].members:
            if member.role == "in":
                assert not parameters[member.parameter].movedim(member.axis, 0)[member.rows(units)].any()


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def undisturbed() -> tuple[PruningTask, Decision]:
    given = task()
    return given, DReSS(SETTINGS).run(given)


def nothing(folder: Path) -> None:
    """Only killed."""


def cut_short(folder: Path) -> None:
    note = folder / "period.json"
    note.write_text(note.read_text()[:40])


def of_another_form(folder: Path) -> None:
    (folder / "period.json").write_text(json.dumps({"number": "two", "removed": [], "log": None}))


def without_scores(folder: Path) -> None:
    next(folder.glob("scores-*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("at", "damage"), [(4, nothing), (8, nothing), (8, cut_short), (4, of_another_form), (4, without_scores)]
)
def test_it_resumes_to_the_same_weights(
    at: int,
    damage: Callable[[Path], None],
    undisturbed: tuple[PruningTask, Decision],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step of warm-up and two periods of four; killed in the first or in the second, after a checkpoint.

    Where what was kept of the period is damaged, it begins anew, to the same end.
    """
    given, expected = undisturbed
    left = [at]

    def dies(self: Any, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Lasso, "on_step_begin", dies)
        with pytest.raises(KilledError):
            DReSS(SETTINGS).run(task(work=tmp_path))
    assert list(tmp_path.glob("training-*/checkpoint-2"))
    damage(tmp_path)
    resumed = task(work=tmp_path)
    decision = DReSS(SETTINGS).run(resumed)
    assert decision.removed == expected.removed
    for name, value in given.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name

"""Bypass: the contract, the estimator, the budget in expectation, and the same end after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import InputError, ModelError
from secateur.evaluation import Divergence
from secateur.methods import METHODS, Decision, PruningTask
from secateur.methods import bypass as module
from secateur.methods.bypass import Bypass, BypassSettings, Policy, antithetic
from secateur.surgery import masked
from secateur.testing.method_contract import MethodContract
from secateur.types import Cut, Scores

SETTINGS = BypassSettings(steps=6, windows=2, learning_rate=0.1, saliency={"magnitude": 1.0})


class TestBypass(MethodContract):
    method = Bypass
    settings = SETTINGS


def channels() -> PruningTask:
    return TestBypass().task(0.15, kinds=("ffn",), floor=0)


def kl(task: PruningTask, decision: Decision) -> float:
    assert task.calibration is not None
    divergence, rows = Divergence(task.calibration), list(range(len(task.calibration)))
    divergence.read(task.model, rows)
    with masked(task.model, task.graph, Cut.removing(task.graph, decision.removed)):
        return divergence.of(task.model, rows)


def test_with_many_steps_it_is_better_than_its_start() -> None:
    settings = BypassSettings(steps=400, windows=6, learning_rate=0.2, saliency={"random": 1.0})
    start, end = channels(), channels()
    random = METHODS["random"]().run(start)
    assert kl(end, Bypass(settings).run(end)) < 0.8 * kl(start, random)


def test_masks_have_the_probabilities_and_are_mirrored() -> None:
    s = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    pairs = [antithetic(s, 0, step) for step in range(2000)]
    for number in range(2):
        mean = torch.stack([pair[number] for pair in pairs]).mean(0)
        torch.testing.assert_close(mean, s.float(), atol=0.04, rtol=0)
    half = torch.stack([one[2] + other[2] for one, other in pairs])
    assert (half == 1).all(), "at one half, the two masks are opposites"


def test_the_gradient_points_to_units_that_matter() -> None:
    """The loss is the sum of the weights of removed units: units with a weight must become more probable."""
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0])
    policy = Policy(None)
    policy.s = torch.full((4,), 0.5, dtype=torch.float64)
    total = torch.zeros(4, dtype=torch.float64)
    for step in range(1500):
        masks = antithetic(policy.s, 1, step)
        total += policy.gradient(masks, [float((weight * (1 - mask)).sum()) for mask in masks]) / 1500
    torch.testing.assert_close(total.float(), -weight, atol=0.06, rtol=0)
    assert not policy.gradient(masks, [1.0, float("nan")]).any()


def test_it_starts_from_the_ranking_of_all_units() -> None:
    task = TestBypass().task(0.2)
    scores = Scores({group.name: torch.randn(group.size) for group in task.prunable}, on_one_scale=True)
    scores["layers.0.mlp"][5] = scores["layers.1.mlp"][3]  # of equal ones, the earlier group goes first
    values = torch.cat([scores[group.name] for group in task.prunable])
    expected = torch.empty(len(values), dtype=torch.float64)
    expected[values.argsort(stable=True)] = torch.linspace(0, 1, len(values), dtype=torch.float64)
    assert torch.equal(module._ranks(task, scores), expected)


def test_the_expected_size_meets_the_budget() -> None:
    task = TestBypass().task(0.2)
    units = module._Units(task)
    cost = {group.name: task.graph.unit_cost(group) for group in task.prunable}
    for squash in (torch.sigmoid, lambda s: s.clamp(0, 1)):
        values = torch.randn(sum(group.size for group in task.prunable), dtype=torch.float64)
        parts = units.split(units.meeting(values, squash))
        removed = sum(cost[name] * float((1 - part).sum()) for name, part in parts.items())
        assert removed == pytest.approx(0.2 * task.graph.parameter_count(), rel=1e-6)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_to_the_same_answer(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 25})
    expected = Bypass(settings).run(TestBypass().task())
    task = TestBypass().task()
    task.work = tmp_path / "method"
    keep, done = Policy.keep, []

    def killed(self: Policy, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        done.append(self.done)
        if self.done == 14:
            raise KilledError

    monkeypatch.setattr(Policy, "keep", killed)
    with pytest.raises(KilledError):
        Bypass(settings).run(task)
    monkeypatch.setattr(Policy, "keep", lambda self, *a, **k: (keep(self, *a, **k), done.append(self.done)))
    if damaged:
        file = tmp_path / "method" / "policy.safetensors"
        file.write_bytes(file.read_bytes()[:50])
    done.clear()
    found = Bypass(settings).run(task)
    assert done[0] == (1 if damaged else 11)
    assert found.removed == expected.removed
    assert found.scores is not None
    assert expected.scores is not None
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in expected.scores)


def test_what_it_cannot_do_is_refused_early() -> None:
    class OfExperts(MethodContract):
        method = Bypass
        family = "mixtral"

    with pytest.raises(ModelError, match="is not the weight of a linear"):
        Bypass(SETTINGS).check(OfExperts().task(0.1))
    with pytest.raises(InputError, match="trains no adapters"):
        Bypass(BypassSettings(saliency={"lora": 1.0})).check(TestBypass().task())

"""Optimal brain surgery: prices and updates are those of the plain formulas, and the method keeps the contract."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from secateur.compensation import Gram
from secateur.compensation import obs as obs_module
from secateur.compensation.obs import DAMPING, removal_order
from secateur.errors import InputError, ModelError
from secateur.methods import METHODS
from secateur.methods.obs import OBS, OBSSettings
from secateur.testing.method_contract import MethodContract, noise
from secateur.walk import Calibration


class TestOBS(MethodContract):
    method = OBS
    settings = OBSSettings(saliency={"magnitude": 1.0})
    # its one allocation says how many go and not which
    test_every_choice_on_the_way_only_shrinks = None  # type: ignore[assignment]

    def test_it_is_another_choice_than_its_saliency(self) -> None:
        by_norm, by_obs = METHODS["magnitude"]().run(self.task()), self.decide(self.task())
        assert {name: len(units) for name, units in by_norm.removed.items()} == {
            name: len(units) for name, units in by_obs.removed.items()
        }
        assert by_norm.removed != by_obs.removed


def _gram(inputs: int = 8, outputs: int = 5, tokens: int = 200) -> tuple[Gram, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    gram = Gram.empty(outputs, inputs, torch.device("cpu"))
    gram.add(x, x @ weight.T)
    return gram, weight


def _cost(gram: Gram, weight: torch.Tensor, gone: list[int]) -> float:
    """The damped error of the best weights without the inputs ``gone``."""
    damping = DAMPING * float(gram.inputs.diagonal().mean())
    h = gram.inputs + damping * torch.eye(len(gram.inputs))
    wanted = gram.cross + damping * weight.double()
    kept = [column for column in range(len(h)) if column not in gone]
    new = torch.zeros_like(wanted)
    new[:, kept] = wanted[:, kept] @ torch.linalg.inv(h[kept][:, kept])
    return float((new @ h * new).sum() - 2 * (new * wanted).sum())


def test_the_first_unit_is_the_cheapest_of_all_and_each_next_one_given_those_before() -> None:
    gram, weight = _gram()
    columns = torch.arange(8).unsqueeze(1)
    order = removal_order(gram, weight, columns, 4)
    assert len(set(order)) == 4
    for done in range(4):
        left = [unit for unit in range(8) if unit not in order[:done]]
        costs = {unit: _cost(gram, weight, [*order[:done], unit]) for unit in left}
        assert min(costs, key=lambda unit: costs[unit]) == order[done]


def test_units_of_several_columns_are_priced_as_a_whole() -> None:
    gram, weight = _gram()
    columns = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    [first, second] = removal_order(gram, weight, columns, 2)
    alone = {unit: _cost(gram, weight, columns[unit].tolist()) for unit in range(4)}
    assert min(alone, key=lambda unit: alone[unit]) == first
    both = {
        pair: _cost(gram, weight, columns[list(pair)].flatten().tolist())
        for pair in combinations(range(4), 2)
        if first in pair
    }
    assert set(min(both, key=lambda pair: both[pair])) == {first, second}


def test_wide_consumers_lose_several_units_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _gram(inputs=40, tokens=400)
    columns = torch.arange(40).unsqueeze(1)
    monkeypatch.setattr(obs_module, "EXACT", 10)
    monkeypatch.setattr(obs_module, "_ROUNDS", 4)
    order = removal_order(gram, weight, columns, 12)
    assert len(set(order)) == 12


def test_what_it_cannot_do_is_refused_before_anything_is_measured() -> None:
    class OfExperts(MethodContract):
        method = OBS
        family = "mixtral"

    with pytest.raises(ModelError, match="needs one linear"):
        OBS().check(OfExperts().task(0.1))
    with pytest.raises(InputError, match="trains no adapters"):
        OBS(OBSSettings(saliency={"lora": 1.0})).check(TestOBS().task())


def test_the_answer_says_what_compensation_was_worth() -> None:
    task = TestOBS().task()
    task.calibration = Calibration(noise(20, 1))
    decision = OBS(OBSSettings(saliency={"magnitude": 1.0})).run(task)
    assert decision.metrics["loss_after"] <= decision.metrics["loss_before"]
    assert set(decision.updates) <= set(decision.metrics["refits"])

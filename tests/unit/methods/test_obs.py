"""Optimal brain surgery: prices and updates are those of the plain formulas, and the method keeps the contract."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from secateur.compensation import Gram, remove_and_compensate
from secateur.compensation import obs as obs_module
from secateur.compensation.gram import typical
from secateur.compensation.obs import DAMPING, Elimination, removal_order, removed_units
from secateur.config import load_recipe
from secateur.errors import InputError, ModelError
from secateur.graph import trace
from secateur.methods import METHODS
from secateur.methods.obs import OBS, OBSSettings
from secateur.stages import rehearse
from secateur.testing.method_contract import MethodContract, noise
from secateur.testing.tiny import build
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


def _gram(inputs: int = 8, outputs: int = 5, tokens: int = 200, seed: int = 0) -> tuple[Gram, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
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


def test_one_huge_input_does_not_damp_all_others() -> None:
    """Both solvers take the median there."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 8, generator=draw), torch.randn(5, 8, generator=draw)
    x[:, 3] *= 1e4
    gram = Gram.empty(5, 8, torch.device("cpu"))
    gram.add(x, x @ weight.T)
    diagonal = gram.inputs.diagonal()
    damping = Elimination(gram, weight, torch.arange(8).unsqueeze(1)).hessian.diagonal() - diagonal
    torch.testing.assert_close(damping, torch.full_like(damping, DAMPING * float(diagonal.median())), rtol=1e-3, atol=0)
    assert typical(diagonal) == float(diagonal.median())
    assert typical(torch.arange(8.0)) == 3.5


def test_wide_consumers_lose_several_units_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _gram(inputs=40, tokens=400)
    columns = torch.arange(40).unsqueeze(1)
    monkeypatch.setattr(obs_module, "EXACT", 10)
    monkeypatch.setattr(obs_module, "_ROUNDS", 4)
    order = removal_order(gram, weight, columns, 12)
    assert len(set(order)) == 12


def test_prefixes_of_the_steps_are_the_joint_solution_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _gram(inputs=12)
    for columns, pending in ((torch.arange(12).unsqueeze(1), 5), (torch.arange(12).view(4, 3), 64)):
        monkeypatch.setattr(obs_module, "_PENDING", pending)
        elimination = Elimination(gram, weight, columns)
        start, gone = elimination.weight.clone(), list[int]()
        for step in elimination.remove(len(columns) - 1):
            start -= step.outputs.T @ step.inputs
            gone += columns[step.units].flatten().tolist()
            kept = [column for column in range(12) if column not in gone]
            h, wanted = elimination.hessian, elimination.wanted
            torch.testing.assert_close(start[:, kept], wanted[:, kept] @ torch.linalg.inv(h[kept][:, kept]))
            assert float(start[:, gone].abs().max()) < 1e-9
        torch.testing.assert_close(elimination.weight, start)


def test_prices_are_the_rise_of_the_error() -> None:
    gram, weight = _gram()
    elimination, gone = Elimination(gram, weight, torch.arange(8).unsqueeze(1)), list[int]()
    for step in elimination.remove(5):
        rise = _cost(gram, weight, [*gone, *step.units]) - _cost(gram, weight, gone)
        assert step.price == pytest.approx(0.5 * rise, rel=1e-6)
        gone += step.units


def test_each_run_loses_equally_many() -> None:
    gram, weight = _gram()
    order = removal_order(gram, weight, torch.arange(8).view(4, 2), 2, runs=2)
    alone = [_cost(gram, weight, [2 * unit, 2 * unit + 1]) for unit in range(4)]
    assert order == [min((0, 1), key=lambda unit: alone[unit]), min((2, 3), key=lambda unit: alone[unit])]


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_lower_the_error_of_units_that_went_together(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end where the most valuable removed unit has no better place, and between the start and the best of all."""
    monkeypatch.setattr(obs_module, "EXACT", 1)
    monkeypatch.setattr(obs_module, "_ROUNDS", 1)
    better = 0
    for seed in range(8):
        gram, weight = _gram(seed=seed, outputs=2)
        columns = torch.arange(8).view(-1, width)
        count, every = len(columns) // 2, range(len(columns))
        costs = {
            frozenset(units): _cost(gram, weight, columns[list(units)].flatten().tolist())
            for many in (count - 1, count)
            for units in combinations(every, many)
        }
        together, swapped = (frozenset(removed_units(gram, weight, columns, count, swaps=tries)) for tries in (0, 40))
        assert len(swapped) == count
        assert costs[swapped] <= costs[together]
        better += swapped != together
        fewer = min((swapped - {unit} for unit in swapped), key=lambda units: costs[units])
        assert costs[swapped] == min(costs[fewer | {unit}] for unit in every if unit not in fewer)
        assert min(cost for units, cost in costs.items() if len(units) == count) <= costs[swapped]
    assert better


def test_swapped_weights_are_the_joint_solution() -> None:
    gram, weight = _gram(inputs=12, outputs=2, seed=3)
    elimination = Elimination(gram, weight, torch.arange(12).unsqueeze(1))
    list(elimination.remove(6))
    elimination.swap(20)
    kept = [unit for unit in range(12) if unit not in elimination.removed]
    assert len(kept) == 6
    h = elimination.hessian
    expected = elimination.wanted[:, kept] @ torch.linalg.inv(h[kept][:, kept])
    torch.testing.assert_close(elimination.weight[:, kept], expected)


def test_the_method_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs_module, "EXACT", 1)
    monkeypatch.setattr(obs_module, "_ROUNDS", 1)
    task = TestOBS().task(0.5)
    without, with_swaps = (OBS(OBSSettings(saliency={"magnitude": 1.0}, swaps=tries)).run(task) for tries in (0, 20))
    assert {name: len(units) for name, units in without.removed.items()} == {
        name: len(units) for name, units in with_swaps.removed.items()
    }
    assert without.removed != with_swaps.removed


def test_what_it_cannot_do_is_refused_before_anything_is_measured() -> None:
    class OfExperts(MethodContract):
        method = OBS
        family = "mixtral"

    with pytest.raises(ModelError, match="needs one linear"):
        OBS().check(OfExperts().task(0.1))
    with pytest.raises(InputError, match="trains no adapters"):
        OBS(OBSSettings(saliency={"lora": 1.0})).check(TestOBS().task())
    gram, weight = _gram()
    gram.inputs[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        removal_order(gram, weight, torch.arange(8).unsqueeze(1), 1)


def test_the_answer_says_what_compensation_was_worth() -> None:
    task = TestOBS().task()
    task.calibration = Calibration(noise(20, 1))
    decision = OBS(OBSSettings(saliency={"magnitude": 1.0})).run(task)
    assert decision.metrics["loss_after"] <= decision.metrics["loss_before"]
    assert set(decision.updates) <= set(decision.metrics["refits"])


def test_too_little_text_is_refused_with_the_key_to_raise() -> None:
    model = build("llama-gqa")
    graph = trace(model)
    with pytest.raises(ModelError, match=r"at least 5 windows.* the text has 4\. Raise calibration\.tokens"):
        remove_and_compensate(model, graph, {"layers.0.mlp": 3}, Calibration(noise(4, 0)))
    flags = {"method": "obs", "calibration.tokens": 2047, "recovery.repair": False}
    with pytest.raises(InputError, match=r"at least 5 windows .* 3 of 512 tokens"):
        rehearse(model, graph, load_recipe(None, flags=flags))

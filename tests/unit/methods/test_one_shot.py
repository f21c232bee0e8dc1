"""The one-shot methods keep the contract, and their settings reach the criterion."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from secateur import importance
from secateur.methods import METHODS
from secateur.methods.wanda import Wanda, WandaSettings
from secateur.testing.method_contract import MethodContract


class TestRandom(MethodContract):
    method = METHODS["random"]

    def test_another_seed_gives_another_answer(self) -> None:
        assert self.decide(self.task(seed=1)).removed != self.decide(self.task(seed=2)).removed


class TestMagnitude(MethodContract):
    method = METHODS["magnitude"]


class TestMagnitudeOfAll(MethodContract):
    method = METHODS["magnitude"]
    settings = importance.Magnitude(over="all")

    def test_it_is_another_criterion(self) -> None:
        consumers, whole = self.method().run(self.task()).scores, self.decide(self.task()).scores
        assert consumers is not None
        assert whole is not None
        assert not (consumers["layers.0.mlp"] == whole["layers.0.mlp"]).any()


class TestWanda(MethodContract):
    method = Wanda


class TestTaylor(MethodContract):
    method = METHODS["taylor"]


class TestFisher(MethodContract):
    method = METHODS["fisher"]


class TestTaylorOfAMixture(MethodContract):
    method = METHODS["taylor"]
    family = "mixtral"

    def test_the_budget_is_obeyed(self) -> None:
        task = self.task(0.1, protect=("layers.0.*",), kinds=("ffn",))
        assert set(self.decide(task).removed) == {"layers.1.mlp.experts"}


class TestWandaOfAMixture(TestTaylorOfAMixture):
    method = Wanda


class TestFisherOfAMixture(TestTaylorOfAMixture):
    method = METHODS["fisher"]


def test_methods_are_found_by_their_own_names() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert {"lorashear", "random", "magnitude", "wanda", "taylor"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_keys_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        METHODS[name].Settings.model_validate({"no_such_key": 1})


def test_settings_are_checked() -> None:
    for settings, keys in ((WandaSettings, {"inputs": "none"}), (importance.Taylor, {"form": "third"})):
        with pytest.raises(ValidationError):
            settings.model_validate(keys)

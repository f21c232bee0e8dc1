"""A limit in time or tokens is divided among the stages; it never gives more than there is."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from secateur.config import Recipe, load_recipe
from secateur.effort import CAPS, Part, count_of, divide, seconds_of
from secateur.errors import InputError
from secateur.stages import is_sized, sized, sizing
from secateur.testing import tiny

LEAST: dict[Part, int] = {"calibration": 1000, "repair": 500, "recovery": 2000}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2 H", 7200)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-3m", "0s", "nan", "1d", "3m2", "infm"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match=r"effort\.within"):
        load_recipe(None, flags={"effort.within": text})


@pytest.mark.parametrize(
    ("text", "count"), [("1.6M", 1_600_000), ("200k", 200_000), ("6,500,000", 6_500_000), ("7", 7)]
)
def test_counts(text: str, count: int) -> None:
    assert count_of(text) == count


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "0.2", "1.6T", "nan"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(InputError, match=r"effort\.tokens"):
        load_recipe(None, flags={"effort.tokens": text})


@pytest.mark.parametrize("seed", range(40))
def test_the_parts_are_what_there_is(seed: int) -> None:
    draw = random.Random(seed)
    total, costs = 10 ** draw.uniform(0, 9), {part: 10 ** draw.uniform(-4, 1) for part in LEAST}
    needed = sum(LEAST[part] * cost for part, cost in costs.items())
    if total < needed:
        with pytest.raises(InputError, match="too little"):
            divide(total, costs, LEAST, "effort.within=1s")
        return
    amounts = divide(total, costs, LEAST, "effort.within=1s")
    spent = sum(amounts[part] * cost for part, cost in costs.items())
    assert spent <= total * (1 + 1e-9) + 1e-6
    assert all(amounts[part] >= LEAST[part] for part in costs)
    assert all(amounts[part] <= max(cap, LEAST[part]) for part, cap in CAPS.items() if part in amounts)
    assert total - spent <= max(costs.values()) * len(costs) + 1e-6 * total, "what is left goes to recovery"


def test_no_number_is_enough() -> None:
    with pytest.raises(InputError, match="too little"):
        divide(float("nan"), {"recovery": 1.0}, LEAST, "effort.tokens=1")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Gives the machine so many seconds for a token, and three times as many for training on it."""

    def give(forward: float) -> None:
        monkeypatch.setattr(sizing, "measure_speed", lambda recipe, model: sizing.Pace(forward, 3 * forward))

    return give


def test_a_faster_machine_reads_more(speed: Callable[[float], None]) -> None:
    model = tiny.build("llama-gqa")
    recipe = load_recipe(None, flags={"effort.within": "30m", "method": "fisher", "recovery.repair": True})
    speed(1e-3)
    slow = sized(recipe, model)
    speed(1e-5)
    fast = sized(recipe, model)
    assert fast.recovery.steps > 10 * slow.recovery.steps
    assert slow.calibration.tokens < fast.calibration.tokens <= CAPS["calibration"]
    assert fast.recovery.repair_tokens == CAPS["repair"]
    assert not slow.effort.given
    assert is_sized(recipe, slow)
    assert is_sized(recipe, fast)
    assert not is_sized(recipe, load_recipe(None, flags={"method": "fisher", "recovery.repair": True, "seed": 1}))


def test_tokens_are_those_that_are_read() -> None:
    recipe = sized(load_recipe(None, flags={"effort.tokens": "1.6M", "method": "lorashear"}), tiny.build("llama-gqa"))
    step = recipe.training.batch_size * recipe.recovery.window
    read = recipe.calibration.tokens + (recipe.recovery.steps + 80) * step
    assert 1_600_000 - step <= read <= 1_600_000
    assert recipe.recovery.tokens >= recipe.recovery.steps * step


def test_amounts_that_the_recipe_names_stay() -> None:
    named = {"effort.tokens": 400_000, "method": "fisher", "calibration.tokens": 8192, "recovery.repair": False}
    recipe = sized(load_recipe(None, flags=named), tiny.build("llama-gqa"))
    assert recipe.calibration.tokens == 8192
    assert recipe.recovery.steps == (400_000 - 8192) // 512
    with pytest.raises(InputError, match=r"Leave out the keys"):
        sized(load_recipe(None, flags={**named, "recovery.steps": 3}), tiny.build("llama-gqa"))


def test_one_limit_at_a_time() -> None:
    with pytest.raises(InputError, match="not both"):
        load_recipe(None, flags={"effort.within": "30m", "effort.tokens": "1M"})


def test_too_little_is_refused(speed: Callable[[float], None]) -> None:
    speed(1e-3)
    with pytest.raises(InputError, match=r"effort\.within=2s is too little"):
        sized(load_recipe(None, flags={"effort.within": "2s"}), tiny.build("llama-gqa"))


def test_without_a_limit_nothing_changes() -> None:
    assert sized(Recipe(), tiny.build("llama-gqa")) == Recipe()


def test_the_speed_of_this_machine() -> None:
    """A real measurement: the model and its gradients are as before."""
    model = tiny.build("llama-gqa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = load_recipe(None, flags={"effort.within": "3m", "recovery.window": 32, "method": "magnitude"})
    found = sized(recipe, model)
    assert found.recovery.steps >= 10
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

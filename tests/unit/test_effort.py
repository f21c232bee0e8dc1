"""A limit in time or tokens is divided among the stages; it never gives more than there is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.config import Recipe, load_recipe, revise
from secateur.effort import CAPS, ON_A_GPU, Effort, Part, count_of, divide, seconds_of
from secateur.errors import InputError
from secateur.graph import trace
from secateur.methods import method_class
from secateur.stages import effort_for, is_sized, sizing, texts_of
from secateur.testing import tiny


def sized(recipe: Recipe) -> Recipe:
    model = tiny.build("llama-gqa")
    return sizing.sized(recipe, model, trace(model))


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
    recipe = load_recipe(None, flags={"effort.within": "30m", "method": "fisher", "recovery.repair": True})
    speed(1e-3)
    slow = sized(recipe)
    speed(1e-5)
    fast = sized(recipe)
    assert fast.recovery.steps > 10 * slow.recovery.steps
    assert slow.calibration.tokens < fast.calibration.tokens <= CAPS["calibration"]
    assert fast.recovery.repair_tokens == CAPS["repair"]
    assert not slow.effort.given
    assert is_sized(recipe, slow, recipe.effort)
    assert is_sized(recipe, fast, recipe.effort)
    assert not is_sized(recipe, fast, Effort(within="31m"))
    other = load_recipe(None, flags={"method": "fisher", "recovery.repair": True, "seed": 1})
    assert not is_sized(recipe, other, recipe.effort)


@pytest.mark.parametrize(("width", "tokens"), [(100, 2_560), (2048, 40_960), (4864, 65_536), (14_336, 65_536)])
def test_text_for_repair_grows_with_the_width_up_to_a_limit(width: int, tokens: int) -> None:
    config = AutoConfig.for_model("llama", **{**tiny.SPECS["llama-gqa"][1], "intermediate_size": width})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    graph = trace(model)
    assert texts_of(Recipe(), graph)["repair"].tokens == tokens
    named = load_recipe(None, flags={"recovery.repair_tokens": 97_280})
    assert texts_of(named, graph)["repair"].tokens == 97_280


def test_tokens_are_those_that_are_read() -> None:
    recipe = sized(load_recipe(None, flags={"effort.tokens": "1.6M", "method": "lorashear"}))
    step = recipe.training.batch_size * recipe.recovery.window
    read = recipe.calibration.tokens + (recipe.recovery.steps + 80) * step
    assert 1_600_000 - step <= read <= 1_600_000
    assert recipe.recovery.tokens >= recipe.recovery.steps * step


@pytest.mark.parametrize("method", ["fisher", "gisp"])
def test_every_round_reads_its_text_again(method: str) -> None:
    flags = {"effort.tokens": "2M", "method": method, "budget.rounds": 4, "recovery.repair": True}
    recipe = sized(load_recipe(None, flags=flags))
    reading = method_class(method)(recipe.method.settings).reading
    once = int(reading.gradient) * recipe.calibration.tokens
    once += reading.gradient_windows * recipe.calibration.window + (recipe.recovery.repair_tokens or 0)
    steps = recipe.recovery.steps * recipe.training.batch_size * recipe.recovery.window
    assert 1_990_000 < 4 * once + steps <= 2_000_000


@pytest.mark.parametrize("method", ["gisp", "evopress", "bypass"])
def test_windows_of_a_search_count_and_each_is_in_the_text_once(method: str) -> None:
    """A method that reads only windows gets as much text as it reads; nothing counts twice."""
    recipe = sized(load_recipe(None, flags={"effort.tokens": "2M", "method": method}))
    reading, window = method_class(method)(recipe.method.settings).reading, recipe.calibration.window
    windows = (reading.forward_windows + reading.gradient_windows) * window
    if method == "gisp":
        assert recipe.calibration.tokens == windows == 24 * 8 * 512
    else:
        windows += recipe.calibration.tokens
    step = recipe.training.batch_size * recipe.recovery.window
    read = windows + (recipe.recovery.repair_tokens or 0) + recipe.recovery.steps * step
    assert 2_000_000 - step <= read <= 2_000_000


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"name": "gisp", "cuts": 40}, {"name": "gisp", "cuts": 4}),
        ({"name": "evopress", "generations": 60}, {"name": "evopress", "generations": 5}),
        ({"name": "bypass", "steps": 400}, {"name": "bypass", "steps": 20}),
        ({"name": "llm-pruner", "rounds": 9}, {"name": "llm-pruner"}),
        ({"name": "ddp", "steps": 40}, {"name": "ddp", "steps": 40, "distillation": 0.0}),
        ({"name": "lorashear", "period_steps": 200}, {"name": "lorashear", "period_steps": 20}),
        ({"name": "wanda", "inputs": "pruned"}, {"name": "wanda"}),
    ],
)
def test_a_method_that_reads_more_has_less_text_in_the_same_time(
    more: dict[str, Any], less: dict[str, Any], speed: Callable[[float], None]
) -> None:
    speed(1e-3)

    def text(method: dict[str, Any]) -> int:
        recipe = load_recipe(None, flags={"effort.within": "2h", "method": method, "recovery.repair": False})
        found = sized(recipe)
        return found.recovery.steps * 512 + found.calibration.tokens * (method["name"] != "gisp")

    assert text(more) < text(less)


def test_the_parts_of_a_time_take_that_time(speed: Callable[[float], None]) -> None:
    """Forward passes, gradients and training of a search, by hand."""
    speed(1e-4)
    recipe = load_recipe(None, flags={"effort.within": "1h", "method": "evopress", "recovery.repair": False})
    found = sized(recipe)
    candidates = 30 * (8 * 1 + 2 * 4 + 4) + 2 * 4
    read = 3 * recipe.evaluation.tokens + candidates * 512 + (3 + 3) * found.calibration.tokens
    seconds = 60 + 1e-4 * read + 3e-4 * found.recovery.steps * 512
    assert 3600 - 3e-4 * 512 <= seconds <= 3600


@pytest.mark.parametrize("flags", [{}, {"method": "ddp"}, {"method.saliency": {"taylor": 1.0}, "method.name": "obs"}])
def test_a_gpu_gets_a_time_where_nothing_is_said(flags: dict[str, Any]) -> None:
    recipe = revise(load_recipe(None, flags=flags), {"budget.ratio": 0.3})
    assert effort_for(recipe, on_cpu=False) == Effort(within=ON_A_GPU)
    assert effort_for(recipe, on_cpu=True) == Effort()


@pytest.mark.parametrize(
    "flags",
    [
        {"recovery.steps": 220},
        {"effort.tokens": 10**6},
        {"effort.within": "2h"},
        {"method": {"name": "lorashear", "period_steps": 80}},
        {"method": {"name": "bypass", "steps": 300}},
    ],
)
def test_a_gpu_changes_nothing_that_is_said(flags: dict[str, Any]) -> None:
    recipe = revise(load_recipe(None, flags=flags), {"budget.ratio": 0.3})
    assert effort_for(recipe, on_cpu=False) == recipe.effort


def test_other_steps_are_no_run_by_default() -> None:
    """The record of the limit tells them apart."""
    default, steps = Recipe(), revise(Recipe(), {"recovery.steps": 50})
    assert is_sized(default, steps, Effort(within=ON_A_GPU))
    assert not is_sized(default, steps, Effort())
    assert is_sized(default, default, Effort())
    named = revise(Recipe(), {"calibration.tokens": 8192})
    assert not is_sized(named, revise(named, {"calibration.tokens": 4096}), Effort(within=ON_A_GPU))


@pytest.mark.parametrize(
    ("effort", "twice"),
    [
        (Effort(within="30m"), "--within 60m"),
        (Effort(within="1.5 H"), "--within 3h"),
        (Effort(tokens=1_600_000), "--tokens 3200000"),
    ],
)
def test_twice_as_much(effort: Effort, twice: str) -> None:
    assert effort.twice == twice


def test_amounts_that_the_recipe_names_stay() -> None:
    named = {"effort.tokens": 400_000, "method": "fisher", "calibration.tokens": 8192, "recovery.repair": False}
    recipe = sized(load_recipe(None, flags=named))
    assert recipe.calibration.tokens == 8192
    assert recipe.recovery.steps == (400_000 - 8192) // 512
    with pytest.raises(InputError, match=r"Leave out the keys"):
        sized(load_recipe(None, flags={**named, "recovery.steps": 3}))


def test_one_limit_at_a_time() -> None:
    with pytest.raises(InputError, match="not both"):
        load_recipe(None, flags={"effort.within": "30m", "effort.tokens": "1M"})


def test_too_little_is_refused(speed: Callable[[float], None]) -> None:
    speed(1e-3)
    with pytest.raises(InputError, match=r"effort\.within=2s is too little"):
        sized(load_recipe(None, flags={"effort.within": "2s"}))


def test_the_least_limit_is_said_and_is_enough(speed: Callable[[float], None]) -> None:
    """In the unit of the limit, with what takes the rest."""
    speed(1e-3)
    for key, given, rest in (
        ("within", "2s", r"loading, measuring and saving .* takes [\d,]+ seconds"),
        ("tokens", "9", r"what the method itself reads and trains takes [\d,]+ tokens"),
    ):
        flags = {"method": "lorashear", "recovery.repair": False}
        with pytest.raises(InputError, match=rf"effort\.{key}={given} is too little: {rest}") as error:
            sized(load_recipe(None, flags={**flags, f"effort.{key}": given}))
        found = re.search(rf"--{key} (\d+)(s?)", str(error.value))
        assert found is not None
        least = int(found[1])
        sized(load_recipe(None, flags={**flags, f"effort.{key}": f"{least}{found[2]}"}))
        with pytest.raises(InputError, match="too little"):
            sized(load_recipe(None, flags={**flags, f"effort.{key}": f"{least - 1}{found[2]}"}))


def test_without_a_limit_nothing_changes() -> None:
    assert sized(Recipe()) == Recipe()


def test_the_speed_of_this_machine() -> None:
    """A real measurement: the model and its gradients are as before."""
    model = tiny.build("llama-gqa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = load_recipe(
        None, flags={"effort.within": "3m", "recovery.window": 32, "method": "magnitude", "evaluation.tokens": 512}
    )
    found = sizing.sized(recipe, model, trace(model))
    assert found.recovery.steps >= 10
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_several_runs_share_a_limit() -> None:
    assert Effort(within="30m").shared(3) == Effort(within="600s")
    assert Effort(tokens=1000).shared(3) == Effort(tokens=333)
    assert Effort().shared(3) == Effort()


def test_several_runs_share_the_time_by_default() -> None:
    """A run with its part of it is known again; the recipe's own limit was divided before."""
    recipe, half = Recipe(), Effort(within="900s")
    assert effort_for(recipe, on_cpu=False, runs=2) == half
    assert effort_for(revise(recipe, {"effort.within": "10m"}), on_cpu=False, runs=2) == Effort(within="10m")
    steps = revise(recipe, {"recovery.steps": 700})
    assert is_sized(recipe, steps, half, runs=2)
    assert not is_sized(recipe, steps, half)


def test_the_equations_of_repair_have_their_time_whatever_its_text(
    speed: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each consumer of a removed unit is solved once: by hand, from the cube of its kept inputs."""
    speed(1e-4)
    model = tiny.build("llama-gqa")
    flags = {"effort.within": "1h", "method": "magnitude", "recovery.repair": True, "budget.ratio": 0.25}
    recipe = load_recipe(None, flags=flags)
    monkeypatch.setattr(sizing, "_seconds_for", lambda *_: 10.0)
    kept = (36, 30)  # of 48 inputs of the output projection, and of 40 of the down projection
    expected = 2 * 10.0 * (1 + (kept[1] / kept[0]) ** 3)
    assert sizing.solving_seconds(recipe, trace(model), model.device) == pytest.approx(expected)
    found = sized(recipe)
    monkeypatch.setattr(sizing, "solving_seconds", lambda *_: 0.0)
    free = sized(recipe)
    spent = [2e-4 * (one.recovery.repair_tokens or 0) + 3e-4 * one.recovery.steps * 512 for one in (found, free)]
    assert spent[1] - spent[0] == pytest.approx(expected, abs=3e-4 * 512)


def test_the_equations_are_timed_on_a_matrix() -> None:
    model = tiny.build("llama-gqa")
    graph, recipe = trace(model), load_recipe(None, flags={"method": "magnitude"})
    assert 0 < sizing.solving_seconds(recipe, graph, model.device) < 5


@pytest.mark.parametrize(
    ("flags", "adapters", "full"),
    [
        ({"recovery.steps": 5}, 1, 0),
        ({"recovery.steps": 5, "recovery.finetuning": "full"}, 0, 1),
        ({"recovery.steps": 0}, 0, 0),
        ({"recovery.steps": 0, "method": "lorashear"}, 1, 0),
    ],
)
def test_the_step_that_is_timed_is_that_of_the_run(
    flags: dict[str, Any], adapters: int, full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"attach_lora": 0, "full_weights": 0}

    def counted(name: str, work: Any) -> Any:
        def count(*args: Any) -> Any:
            counts[name] += 1
            return work(*args)

        return count

    for name in counts:
        monkeypatch.setattr(sizing, name, counted(name, getattr(sizing, name)))
    model = tiny.build("llama-gqa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pace = sizing.measure_speed(load_recipe(None, flags={"recovery.window": 16, "method": "fisher", **flags}), model)
    assert pace.training > 0 < pace.forward
    assert counts == {"attach_lora": adapters, "full_weights": full}
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

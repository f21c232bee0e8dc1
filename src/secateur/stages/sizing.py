"""Turns a limit in time or tokens (``effort``) into the amounts of every stage, before the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.compensation import EVERY, Gram, check_refittable, solve_refit
from secateur.config import Recipe, revise
from secateur.data import Purpose, Texts, TextSettings
from secateur.effort import CAPS, ON_A_GPU, Effort, Part, divide, seconds_of
from secateur.errors import InputError, ModelError
from secateur.export import mean_perplexity
from secateur.methods import TextRead, method_class
from secateur.planning import restrict
from secateur.precision import autocast
from secateur.progress import say
from secateur.stages.result import Measured, Metrics, Result
from secateur.token_loss import LogitReader, TokenLoss
from secateur.training import attach_lora, full_weights
from secateur.types import DependencyGraph
from secateur.walk import borrowed

_KEYS: Mapping[Part, str] = {
    "calibration": "calibration.tokens",
    "repair": "recovery.repair_tokens",
    "reconstruction": "recovery.reconstruct_tokens",
    "recovery": "recovery.steps",
}
"""Part → the key of its amount."""
_PASSES: Mapping[Part, float] = {"repair": 2.0, "reconstruction": 6.0}
"""Cost of a token in forward passes. Reconstruction reads three times, and trains."""
_GRADIENT = 3.0
"""Cost of a pass with gradients in forward passes."""
_TOKENS_PER_INPUT = 20
_MOST_REPAIR = 65_536
"""Tokens for repair by default, at most: with more, the repair of wide layers takes longer than the default recovery.
20 for each kept input of 4,864 after a cut of 20 %."""
_FEWEST_STEPS = 10
_FEWEST_WINDOWS = 16
_TAKERS: Mapping[str, str] = {
    "seconds": "loading, measuring and saving the model, and what the method itself reads and trains,",
    "tokens": "what the method itself reads and trains",
}
_TIMED_WIDTH = 1024
"""Inputs of the consumer whose equations are timed; wider ones are reckoned from it."""
_REST = 60.0
"""Seconds for loading, timing, saving and verifying."""


@dataclass(frozen=True)
class Pace:
    """Seconds for one token on this machine."""

    forward: float
    training: float
    """Of a training step, its optimiser included."""


def sized(recipe: Recipe, model: PreTrainedModel, graph: DependencyGraph) -> Recipe:
    """The recipe with its ``effort`` turned into amounts; unchanged when it names none.

    Amounts that the recipe names itself stay. The result has no ``effort``: it repeats the run on any machine.

    Args:
        model: the dense one; its speed is measured, and it is restored.
        graph: that of the model.

    Raises InputError when the limit is too small, or when no amount is left to choose.
    """
    effort = recipe.effort
    if not effort.given:
        return recipe
    parts = _parts(recipe)
    flags: dict[str, Any] = {}
    if _by_windows(recipe) and "tokens" not in recipe.calibration.model_fields_set:
        flags["calibration.tokens"] = _windows_text(recipe)
        recipe = revise(recipe, flags)
    open_parts = [part for part in parts if not _is_set(recipe, _KEYS[part])]
    if not open_parts:
        raise InputError(
            f"effort sets {', '.join(_KEYS[part] for part in parts) or 'amounts of text'}, and this recipe names them "
            "or does not need them. Leave out the keys, or leave out effort (--within, --tokens)."
        )
    if effort.within is not None:
        measured = measure_speed(recipe, model)
        costs = {part: _times(part, recipe) * _seconds(part, recipe, measured) for part in parts}
        given, total = f"effort.within={effort.within}", seconds_of(effort.within)
        taken = _fixed_seconds(recipe, measured)
        if "repair" in parts:
            taken += _times("repair", recipe) * solving_seconds(recipe, graph, model.device)
        say(f"This machine reads {1 / measured.forward:,.0f} tokens a second and trains {1 / measured.training:,.0f}.")
    else:
        assert effort.tokens is not None
        costs = {part: float(_times(part, recipe)) for part in parts}
        if "calibration" in costs:
            costs["calibration"] *= 0.0 if _by_windows(recipe) else max(1.0, _reading(recipe).gradient)
        given, total = f"effort.tokens={effort.tokens}", float(effort.tokens)
        taken = float(_method_tokens(recipe))
    taken += sum(_amount(part, recipe) * costs[part] for part in parts if part not in open_parts)
    least = {part: _least(part, recipe) for part in open_parts}
    unit: Literal["seconds", "tokens"] = "tokens" if effort.within is None else "seconds"
    by = _TAKERS[unit] + (", with the amounts that the recipe names," if len(open_parts) < len(parts) else "")
    shares = {part: costs[part] for part in open_parts}
    amounts = divide(total, shares, least, given, unit=unit, taken=taken, by=by)
    flags |= {_KEYS[part]: _value(part, tokens, recipe) for part, tokens in amounts.items()}
    if "recovery" in amounts and "tokens" not in recipe.recovery.model_fields_set:
        flags["recovery.tokens"] = max(recipe.recovery.tokens, amounts["recovery"])
    say("  " + ", ".join(f"{key} = {value:,}" for key, value in flags.items()))
    return revise(recipe, {**flags, "effort.within": None, "effort.tokens": None})


def texts_of(recipe: Recipe, graph: DependencyGraph) -> dict[Purpose, TextSettings]:
    """``recipe.texts``, with tokens for repair by the widths of the model unless the recipe names them."""
    texts = dict(recipe.texts)
    if "repair" in texts and recipe.recovery.repair_tokens is None:
        enough = min(_TOKENS_PER_INPUT * max(_widths(recipe, graph), default=0), _MOST_REPAIR)
        tokens = max(enough, texts["repair"].tokens)
        texts["repair"] = texts["repair"].model_copy(update={"tokens": tokens})
    return texts


def _widths(recipe: Recipe, graph: DependencyGraph) -> list[int]:
    """The number of inputs of each matrix that consumes units that may be removed."""
    members = [member for group in restrict(graph, recipe.budget).prunable for member in group.members]
    inputs = {
        member.parameter: graph.shapes[member.parameter][member.axis] for member in members if member.role == "in"
    }
    return list(inputs.values())


def with_possible_repair(recipe: Recipe, model: PreTrainedModel, graph: DependencyGraph) -> Recipe:
    """The recipe without repair where it is only a default, and this model does not allow it. Says so."""
    if not _repairs_by_default(recipe):
        return recipe
    try:
        names = [group.name for group in restrict(graph, recipe.budget).prunable]
        check_refittable(model, graph, names, recipe.recovery.repair_target)
    except ModelError as error:
        say(f"Without repair: {error}")
        return revise(recipe, {"recovery.repair": False})
    return recipe


def spare_texts(recipes: Iterable[Recipe]) -> set[Purpose]:
    """The purposes that these recipes can do without: repair, where it is only a default."""
    repaired = [recipe for recipe in recipes if recipe.recovery.repair]
    return {"repair"} if all(map(_repairs_by_default, repaired)) else set()


def with_text(recipe: Recipe, texts: Texts) -> Recipe:
    """The recipe without repair where it is only a default, and there is no text for it."""
    without = texts.repair is None and _repairs_by_default(recipe)
    return revise(recipe, {"recovery.repair": False}) if without else recipe


def _repairs_by_default(recipe: Recipe) -> bool:
    return bool(recipe.recovery.repair) and "repair" not in recipe.recovery.model_fields_set


def effort_for(recipe: Recipe, *, on_cpu: bool, runs: int = 1) -> Effort:
    """The recipe's effort; on a device that is no CPU ``ON_A_GPU``, unless the recipe says how long to train.

    ``runs`` share the latter. The recipe's own is that of one run.
    """
    return recipe.effort if on_cpu or recipe.names_steps else Effort(within=ON_A_GPU).shared(runs)


def is_sized(given: Recipe, written: Recipe, effort: Effort, runs: int = 1) -> bool:
    """Whether ``written`` is ``given`` with or without repair where that is left to the model, and with amounts by
    ``effort``, where that is the one of ``given`` on some device, as one of ``runs``."""
    flags: dict[str, Any] = {}
    if "repair" not in given.recovery.model_fields_set:
        flags["recovery.repair"] = written.recovery.repair
    if effort.given and effort == effort_for(given, on_cpu=False, runs=runs):
        keys = [*_KEYS.values(), "recovery.tokens"]
        flags |= {key: _at(written, key) for key in keys if not _is_set(given, key)}
        flags |= {"effort.within": None, "effort.tokens": None}
    return revise(given, flags) == written


def with_more_time(result: Result) -> str | None:
    """What recovery took in this run, and how to give it twice as much; None when it was not run for all its steps."""
    recipe, measured = result.recipe, result.measured
    steps, seconds = recipe.recovery.steps, measured.seconds.get("recovery")
    if measured.recovery is None or seconds is None or recipe.recovery.round_steps > 0 or recipe.budget.rounds > 1:
        return None
    before, after = (_perplexity(one, measured) for one in (measured.pruned, measured.recovered))
    gained = "" if before is None or after is None else f": perplexity {before:.1f} → {after:.1f}"
    took = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    more = f"Twice the steps take about {took} more: --set recovery.steps={2 * steps}"
    if measured.effort is not None:
        more = f"Twice the limit: {measured.effort.twice}"
    return f"{steps:,} steps of recovery ({steps * _step_tokens(recipe):,} tokens) took {took}{gained}. {more}"


def _perplexity(state: Measured | None, measured: Metrics) -> float | None:
    """Perplexity over all sources; None where it was not measured."""
    if state is None or not state.perplexity or not measured.tokens:
        return None
    return mean_perplexity(state.perplexity, measured.tokens)


def measure_speed(recipe: Recipe, model: PreTrainedModel) -> Pace:
    """Time a forward pass and a training step of one micro-batch, each after one that warms up.

    The step trains what the recipe trains: adapters, or all weights with an optimiser. Where nothing trains, it is not
    tried, and counts as three forward passes.
    """
    settings = recipe.training
    rows = min(settings.micro_batch_size, settings.batch_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, recipe.recovery.window), generator=draw)
    ids = ids.to(model.device)

    with borrowed(model), autocast(settings.precision, model.device):
        reader = LogitReader(model, ids)
        read = _seconds_for(lambda: reader.read(ids, _drop), ids.numel(), model.device)
        if not _trains(recipe):
            return Pace(read, _GRADIENT * read)
        with _trainable(model, recipe) as trained:
            loss = TokenLoss(trained, ids)
            passes = _seconds_for(lambda: _train_once(loss, ids), ids.numel(), model.device)
            weights = [parameter for parameter in trained.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=0.0)  # with this rate, weights keep their values
            step = _seconds_for(optimizer.step, _step_tokens(recipe), model.device)
    return Pace(read, passes + step)


def solving_seconds(recipe: Recipe, graph: DependencyGraph, device: torch.device) -> float:
    """Seconds that the equations of one repair take, whatever its text.

    Those of the widest consumer are timed, and reckoned for the others by the cube of the kept inputs. The budget's
    ratio is taken for the removed share of each.
    """
    kept = [max(1, round(width * (1 - recipe.budget.ratio))) for width in _widths(recipe, graph)]
    if not kept:
        return 0.0
    width = min(max(kept), _TIMED_WIDTH)
    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0)).to(device)
    sums, weight = Gram.empty(width, width, device), torch.zeros(width, width, device=device)
    sums.add(x, x)
    once = _seconds_for(lambda: solve_refit(sums, sums, weight, torch.arange(width)), 1, device)
    return once * sum((one / width) ** 3 for one in kept)


def _trains(recipe: Recipe) -> bool:
    return recipe.recovery.steps > 0 or _trained_tokens(recipe) > 0


@contextmanager
def _trainable(model: PreTrainedModel, recipe: Recipe) -> Iterator[nn.Module]:
    """What recovery trains, all weights or adapters; adapters where only the method trains. Restored at the end."""
    if recipe.recovery.steps > 0 and recipe.recovery.finetuning == "full":
        with full_weights(model):
            yield model
        return
    adapted = attach_lora(model, recipe.lora, 0)
    try:
        yield adapted
    finally:
        adapted.unload()


def _drop(*_: Any) -> None:
    """No use is made of the logits: it is the time that counts."""


def _train_once(loss: TokenLoss, ids: torch.Tensor) -> None:
    with torch.enable_grad():
        loss.backward(ids)


def _seconds_for(work: Callable[[], object], tokens: int, device: torch.device) -> float:
    """Seconds per token of ``work``, the second time that it runs."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds / tokens


def _parts(recipe: Recipe) -> list[Part]:
    """The parts that this run has."""
    texts = recipe.texts
    found: list[Part] = ["calibration"] if "calibration" in texts else []
    found += ["repair"] if "repair" in texts else []
    found += ["reconstruction"] if recipe.recovery.reconstruct else []
    return [*found, "recovery"] if recipe.recovery.steps > 0 else found


def _times(part: Part, recipe: Recipe) -> int:
    """How often a part reads its text: in every round, while the rounds share the steps of recovery."""
    return 1 if part == "recovery" else recipe.budget.rounds


def _is_set(recipe: Recipe, key: str) -> bool:
    section, _, name = key.partition(".")
    return name in getattr(recipe, section).model_fields_set and _at(recipe, key) is not None


def _at(recipe: Recipe, key: str) -> int | None:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    value: int | None = getattr(getattr(recipe, section), name)
    return value


def _step_tokens(recipe: Recipe) -> int:
    return recipe.training.batch_size * recipe.recovery.window


def _amount(part: Part, recipe: Recipe) -> int:
    """Tokens that the recipe gives to a part now."""
    value = _at(recipe, _KEYS[part]) or 0
    return value * _step_tokens(recipe) if part == "recovery" else value


def _value(part: Part, tokens: int, recipe: Recipe) -> int:
    """The value of a part's key for so many tokens."""
    return tokens // _step_tokens(recipe) if part == "recovery" else tokens


def _least(part: Part, recipe: Recipe) -> int:
    if part == "recovery":
        return _FEWEST_STEPS * _step_tokens(recipe)
    return (_FEWEST_WINDOWS if part == "calibration" else EVERY) * recipe.calibration.window


def _seconds(part: Part, recipe: Recipe, speed: Pace) -> float:
    """Seconds for one token of a part."""
    if part == "calibration":
        readings = [_reading(recipe)] + ([method_class(recipe.baseline)().reading] if recipe.baseline else [])
        passes = sum(reading.forward + _GRADIENT * reading.gradient for reading in readings)
        return speed.forward * (passes if _by_windows(recipe) else max(1.0, passes))
    if part != "recovery":
        more = 1.0
        if part == "repair" and recipe.recovery.repair_target != "own":
            more = 2.0  # the dense model runs as well
        if part == "reconstruction":
            more = (1 + recipe.recovery.reconstruct_epochs) / 2
        return _PASSES[part] * speed.forward * more
    return speed.training + (speed.forward if recipe.recovery.teacher > 0 else 0.0)


def _reading(recipe: Recipe) -> TextRead:
    return recipe.method.built.reading


def _by_windows(recipe: Recipe) -> bool:
    """Whether the method reads only single windows of the calibration text. Then a longer text costs nothing."""
    reading = _reading(recipe)
    return reading.forward == reading.gradient == 0 and reading.forward_windows + reading.gradient_windows > 0


def _windows_text(recipe: Recipe) -> int:
    """Calibration tokens with which such a method reads each window once, if that is not too much."""
    reading = _reading(recipe)
    windows = max(_FEWEST_WINDOWS, reading.forward_windows, reading.gradient_windows)
    return min(windows * recipe.calibration.window, max(CAPS["calibration"], _least("calibration", recipe)))


def _trained_tokens(recipe: Recipe) -> int:
    """Tokens that the method itself trains on."""
    return recipe.method.built.training_steps * _step_tokens(recipe)


def _method_tokens(recipe: Recipe) -> int:
    """Tokens that the method itself trains on, and those of single windows."""
    reading = _reading(recipe)
    windows = recipe.budget.rounds * (reading.forward_windows + reading.gradient_windows)
    return _trained_tokens(recipe) + windows * recipe.calibration.window


def _fixed_seconds(recipe: Recipe, speed: Pace) -> float:
    """Seconds of what the effort does not change: measuring, the method's own training, and its single windows."""
    measured = 2 + (recipe.recovery.steps > 0) + (recipe.baseline is not None)
    reading = _reading(recipe)
    windows = recipe.budget.rounds * (reading.forward_windows + _GRADIENT * reading.gradient_windows)
    read = measured * recipe.evaluation.tokens + windows * recipe.calibration.window
    read += reading.dense_steps * _step_tokens(recipe)
    return _REST + read * speed.forward + _trained_tokens(recipe) * speed.training

"""The rounds of a run before its last one: each chooses units, repairs, cuts and recovers, and the next scores anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from transformers import PreTrainedModel

from secateur.config import Recipe
from secateur.data import Texts
from secateur.evaluation import parameter_count
from secateur.graph.twin import twin_of
from secateur.importance import Random
from secateur.keeping import keep_tensors, take_tensors
from secateur.methods import PruningTask
from secateur.planning import SmallRatioError
from secateur.progress import say
from secateur.stages.position import Position
from secateur.stages.result import Result
from secateur.surgery import apply_updates, slice_model
from secateur.types import Cut, DependencyGraph, Removed
from secateur.workspace import Workspace

_FOLDER = "rounds"


class Titled(Protocol):
    """A stage, as far as it is announced."""

    @property
    def title(self) -> str: ...


Make = Callable[[Result, Texts, Workspace, Callable[[Titled], AbstractContextManager[Any]]], None]
"""Runs the stages of one round."""


def rehearse_rounds(model: PreTrainedModel, graph: DependencyGraph, recipe: Recipe) -> Removed:
    """Units that all rounds together remove by random scores, on a twin of the model without weights.

    Raises the errors of the budget of every round, and ModelError for a model that no second round can go on from.
    """
    budget, twin = recipe.budget, cast(PreTrainedModel, twin_of(model))
    here = Position(graph, graph)
    while True:
        removed = here.removed(_by_chance(twin, here, recipe))
        if here.done == budget.rounds - 1:
            return removed
        kept = Cut.removing(graph, removed)
        slice_model(twin, here.graph, here.here(kept))
        here = here.after_round(twin, kept, budget)


def _by_chance(model: PreTrainedModel, here: Position, recipe: Recipe) -> Removed:
    """Units that the next round removes by random scores; none when its part is smaller than a unit."""
    task = PruningTask(model, None, here.graph, here.budget(recipe.budget), seed=recipe.seed)
    with suppress(SmallRatioError):
        if task.budget.ratio > 0:
            return task.allocate(Random().score(model, task.restricted, None, recipe.seed))
    return {}


def prune_in_rounds(result: Result, texts: Texts, work: Workspace, make: Make) -> None:
    """Run every round but the last. Keeps weights and units after each, and the stages of an unfinished one.

    Afterwards ``result.model`` is the smaller model, and ``result.position`` says which units it has.
    """
    while not take_rounds(result, work):
        here = result.here
        number = here.done + 1
        name = f"{_FOLDER}/round-{number}"
        part = Result(result.model, result.tokenizer, result.plan, result.graph, result.recipe)
        part.position, part.teacher = here, result.teacher
        make(part, texts, work.inside(name), partial(_announced, number, result.recipe))
        result.position = here.after_round(result.model, part.plan.kept, result.recipe.budget)
        numbers = {"parameters": parameter_count(result.model), **part.metrics}
        result.measured.rounds = [*(result.measured.rounds or []), numbers]
        facts = {"kept": part.plan.kept, "rounds": result.measured.rounds}
        keep_tensors(_file(work, number), dict(result.model.named_parameters()), facts)
        work.discard(name)
        work.discard(f"{_FOLDER}/round-{here.done}.safetensors")


def take_rounds(result: Result, work: Workspace) -> bool:
    """Go to the position after the last kept round; whether only the last of all rounds is left to do."""
    if result.position is None:
        result.position = _kept_position(result, work)
    return result.here.done == result.recipe.budget.rounds - 1


def _kept_position(result: Result, work: Workspace) -> Position:
    """Restore the model after the last round that is kept. The model given is the dense one."""
    start, budget = result.here, result.recipe.budget
    for number in range(budget.rounds - 1, 0, -1):
        found = take_tensors(_file(work, number))
        if found is not None:
            weights, facts = found
            slice_model(result.model, start.graph, facts["kept"])
            apply_updates(result.model, weights)
            result.measured.rounds = facts["rounds"]
            before = replace(start, done=number - 1)
            return before.after_round(result.model, facts["kept"], budget)
    result.measured.rounds = None
    return start


@contextmanager
def _announced(number: int, recipe: Recipe, stage: Titled) -> Iterator[None]:
    say(f"  Round {number} of {recipe.budget.rounds}: {stage.title.format(method=recipe.method.name)}")
    yield


def _file(work: Workspace, number: int) -> Path | None:
    return work.path(f"{_FOLDER}/round-{number}.safetensors")

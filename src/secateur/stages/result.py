"""The result of a run, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.config import Recipe
from secateur.effort import Effort
from secateur.export import Architecture
from secateur.planning import make_plan
from secateur.recovery import CachedTeacher
from secateur.stages.position import Position
from secateur.types import DependencyGraph, PruningPlan, Removed, Scores

State = Literal["dense", "pruned", "recovered"]


class Measured(BaseModel):
    """The numbers of a model in one state; None where nothing was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int
    bytes: int
    """On disk, in the types that are written."""
    perplexity: dict[str, float] | None = None
    """By source."""
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


class Baseline(BaseModel):
    """A one-shot method without training at the same ratio."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    perplexity: dict[str, float]


class Metrics(BaseModel):
    """All numbers of a run; ``metrics.json`` contains those that are not None."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    dense: Measured | None = None
    baseline: Baseline | None = None
    pruned: Measured | None = None
    recovered: Measured | None = None
    reference: dict[str, float] | None = None
    """The dense model's loss on the text that recovery watches, by source."""
    method: dict[str, Any] | None = None
    """The method's own record, such as ``training``, the log of its steps."""
    repair: dict[str, Any] | None = None
    """``refits`` by consumer, the ``step`` of all together, ``loss_before`` and ``loss_after`` on the check windows."""
    reconstruct: dict[str, Any] | None = None
    """``blocks`` by consumer; the rest as in ``repair``."""
    recovery: dict[str, Any] | None = None
    """``log`` of the steps, and ``rounds``."""
    rounds: list[dict[str, Any]] | None = None
    """The numbers of every round before the last (``budget.rounds``), with the ``parameters`` after it."""
    speed: dict[str, Any] | None = None
    """See ``evaluation.compare_speed``."""
    window: int | None = None
    windows: dict[str, Any] | None = None
    """See ``evaluation.Windows``."""
    tokens: dict[str, int] | None = None
    """Tokens that were scored, by source."""
    seconds: dict[str, float] = {}
    """By stage."""
    machine: dict[str, Any] | None = None
    effort: Effort | None = None
    """The limit by which the amounts in the recipe were chosen."""

    def of(self, state: State) -> Measured | None:
        """The numbers of one state."""
        found: Measured | None = getattr(self, state)
        return found

    @property
    def last(self) -> State:
        """The state of the model at the end."""
        return "recovered" if self.recovered is not None else "pruned"


@dataclass
class Result:
    """The result of a run; ``secateur.save`` writes it to a folder."""

    model: PreTrainedModel
    """The smaller model: the one that was given, changed in place."""
    tokenizer: PreTrainedTokenizerBase | None
    plan: PruningPlan
    graph: DependencyGraph
    """Of the model before the first cut. The plan contains its units."""
    recipe: Recipe
    output: Path | None = None
    """Folder to save the result to at the end; None when it is not saved."""
    dense: Architecture | None = None
    """Class and config from before the cut; the model itself now has those of the small model."""
    scores: Scores | None = None
    given: Scores | None = None
    """Scores of a run of the same method to a larger ratio. The units are chosen by them, and the method is not run."""
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    """New values of parameters from the method (``Decision.updates``), repair and reconstruction; ``cut`` writes and
    releases them. Until then the model is that of ``here``."""
    position: Position | None = None
    """Where the model in memory stands after the first rounds; None for the dense model."""
    teacher: PreTrainedModel | CachedTeacher | None = None
    """The dense model, or its predictions, while recovery still needs them (``recovery.teacher``)."""
    unsavable: str | None = None
    """Why no config describes the small model. The model in memory still works."""
    measured: Metrics = field(default_factory=Metrics)
    done: list[str] = field(default_factory=list)
    """Stages whose outcome is kept (``stages.STAGES``)."""
    resumed: bool = False
    """Whether stages that an earlier call finished were taken over (``stages.take_up``)."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened when, as in ``run.jsonl``."""

    @property
    def here(self) -> Position:
        """The model in memory, as ``decide`` and the stages up to ``cut`` act on it."""
        return self.position or Position(self.graph, self.graph)

    @property
    def metrics(self) -> dict[str, Any]:
        """``measured`` as a JSON object, without values that were not measured: a copy."""
        return self.measured.model_dump(exclude_none=True)


def plan_for(graph: DependencyGraph, recipe: Recipe, removed: Removed) -> PruningPlan:
    """The plan of a run that removes these units."""
    return make_plan(
        graph,
        removed,
        recipe.budget,
        method=recipe.method.name,
        seed=recipe.seed,
        base_model=recipe.model.name,
        revision=recipe.model.revision,
    )

"""The interface of a method: it takes a task and returns the units to remove."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data import TokenBlocks
from secateur.errors import InputError
from secateur.graph import trace
from secateur.importance import Criterion
from secateur.planning import Budget, Problem, restrict, solve
from secateur.training import LoraSettings, TrainingSettings
from secateur.types import DependencyGraph, Kind, NodeGroup, Scores, Settings
from secateur.walk import Calibration

MethodNeeds = Literal["nothing", "text", "training"]


def _ignore(entry: Mapping[str, Any]) -> None:
    """The default log of a task: drops every entry."""


@dataclass
class PruningTask:
    """The inputs of a method. With ``changes_weights`` it may change the model's weights, never its shapes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    graph: DependencyGraph
    budget: Budget
    calibration: Calibration | None = None
    """Text for measuring importance; None when the method needs no text."""
    training_blocks: TokenBlocks | None = None
    """Text to train on; None when the method does not train."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    work: Path | None = None
    """Folder for checkpoints, from which a long method resumes; None to keep none."""
    log: Callable[[Mapping[str, Any]], None] = _ignore
    """Writes one entry to the run's log."""

    @cached_property
    def restricted(self) -> DependencyGraph:
        """The task's graph, with every group protected that the budget excludes (``planning.restrict``)."""
        return restrict(self.graph, self.budget)

    @property
    def prunable(self) -> tuple[NodeGroup, ...]:
        """The groups that the budget may cut."""
        return self.restricted.prunable

    def score(self, criterion: Criterion, seed: int | None = None) -> Scores:
        """Scores of the prunable groups, by the model as it is now; with the task's seed unless one is given."""
        return criterion.score(self.model, self.restricted, self.calibration, self.seed if seed is None else seed)

    def allocate(
        self, scores: Scores, removed: Mapping[str, Iterable[int]] | None = None, ratio: float | None = None
    ) -> dict[str, list[int]]:
        """The units to remove under the task's budget; arguments and result as in ``planning.allocate``."""
        return solve(Problem.of(self.restricted, scores, self.budget, removed), ratio)


@dataclass(frozen=True)
class Decision:
    """The result of a method."""

    removed: dict[str, list[int]]
    """Group name → units to remove, ascending."""
    scores: Scores | None = None
    """The last scores, for the record."""
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    """Path of a parameter → its new values, written when the units are cut (``surgery.apply_updates``).

    Each tensor has the shape that the parameter has before the cut. The path may also be that of a bias that a linear
    does not have yet.
    """
    metrics: dict[str, Any] = field(default_factory=dict)
    """Other facts worth keeping, JSON-able."""


@dataclass(frozen=True)
class TextRead:
    """How much text a method reads while it chooses, beside its training (``Method.training_steps``)."""

    forward: float = 0.0
    """Passes over all calibration text without gradients."""
    gradient: float = 0.0
    """Passes over all calibration text with gradients."""
    forward_windows: int = 0
    """Single calibration windows without gradients, each time that one is read."""
    gradient_windows: int = 0
    """The same with gradients."""
    dense_steps: int = 0
    """Training steps whose text the dense model reads as well."""

    @classmethod
    def by(cls, criteria: Iterable[Criterion], passes: int = 1) -> TextRead:
        """That of ``passes`` scores by each of the criteria."""
        needs = [criterion.needs for criterion in criteria]
        forward, nothing = needs.count("activations"), needs.count("nothing")
        return cls(forward=passes * forward, gradient=passes * (len(needs) - forward - nothing))


class NoSettings(Settings):
    """This method has no settings of its own."""


class Method(ABC):
    """One way of choosing the units to remove. A subclass has a name, overrides the defaults below, and defines
    ``run``.

    It is built with its own settings, or without arguments for their defaults.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line."""
    paper: ClassVar[str] = ""
    """Link to the paper; empty when there is none."""
    needs: ClassVar[MethodNeeds] = "nothing"
    """Inputs of ``run``. ``nothing``: weights only; ``text``: calibration text; ``training``: training text as well."""
    changes_weights: ClassVar[bool] = False
    """Whether ``run`` changes the model's weights. If so, they are kept for ``--resume``."""
    repairable: ClassVar[bool] = False
    """Whether ``recovery.repair`` may start from the decision's ``updates``: they are no refit, and add no bias."""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """The kinds of groups that it can cut, if not all. They become the default of ``budget.kinds``."""
    fewest_windows: ClassVar[int] = 0
    """Calibration windows without which ``run`` fails."""
    Settings: ClassVar[type[Settings]] = NoSettings
    """Its own settings."""

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = settings or self.Settings()

    @property
    def training_steps(self) -> int:
        """Optimiser steps of ``run``; a method that trains has at least one."""
        return 0

    @property
    def reading(self) -> TextRead:
        """The text that ``run`` reads beside its training, by which a limit in time or tokens is divided. By default
        one pass with gradients over the calibration text, or nothing where it needs none."""
        return TextRead(gradient=0.0 if self.needs == "nothing" else 1.0)

    @property
    def compensates(self) -> bool:
        """Whether the decision has ``updates``. Then ``recovery.repair`` must be off, or the cut is compensated
        twice; not so for a method that is ``repairable``."""
        return False

    @property
    def ranks(self) -> bool:
        """Whether its scores alone decide (``planning.allocate``), for every smaller ratio too. Then one run of it
        answers several ratios."""
        return False

    def check(self, task: PruningTask) -> None:
        """Raise the SecateurError that ``run`` would raise: impossible kinds, groups, settings, adapters.

        It is quick, changes nothing, and reads no text: the task has none yet.
        """
        if self.kinds and set(task.budget.kinds) != set(self.kinds):
            raise InputError(
                f"{self.name} cuts groups of kind {', '.join(self.kinds)}, and the budget allows "
                f"{', '.join(task.budget.kinds)}. Set budget.kinds=[{','.join(self.kinds)}], or leave it out."
            )

    @abstractmethod
    def run(self, task: PruningTask) -> Decision:
        """Choose the units to remove: within one unit of the task's ratio, and the same for the same seed."""


def adapted_graph(adapted: PeftModel, task: PruningTask) -> DependencyGraph:
    """The graph of the task's model with adapters on, restricted as the task's own."""
    return trace(adapted).protected_as(task.restricted)

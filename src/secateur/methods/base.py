"""What a method is: it looks at a task and answers with the units that go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.importance import Criterion
from secateur.planning import Budget, allocate, restrict
from secateur.precision import autocast
from secateur.training import LoraSettings, TrainingSettings
from secateur.types import DependencyGraph, Scores, Settings

MethodNeeds = Literal["nothing", "text", "training"]


def _ignore(entry: Mapping[str, Any]) -> None:
    """The log of a task that nobody listens to."""


@dataclass
class PruningTask:
    """Everything that a method may look at. The model is changed by methods that train, never in shape."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    graph: DependencyGraph
    budget: Budget
    calibration: TokenBlocks | None = None
    """Text to measure importance on; None when the method needs nothing."""
    training_blocks: TokenBlocks | None = None
    """Text to train on; None when the method does not train."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    repair: bool = False
    """Whether what consumes the units that stay is refitted after the cut (``recovery.repair``)."""
    work: Path | None = None
    """Folder for the checkpoints that a long method resumes from; None to keep none."""
    log: Callable[[Mapping[str, Any]], None] = _ignore
    """Takes one entry of the run's log."""


@dataclass(frozen=True)
class Decision:
    """What a method answers."""

    removed: dict[str, list[int]]
    """Group name → units that go, ascending."""
    scores: Scores | None = None
    """The last scores, for the record."""
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    """Path of a linear → ``[outputs]``, to be added to its bias when the units are cut (``surgery.add_biases``)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth keeping, JSON-able."""


class Method(Protocol):
    """One way of choosing what goes. Its class is built with its own settings, or without for the defaults."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """Link to where it comes from; empty for folklore."""
    summary: ClassVar[str]
    """One line."""
    needs: ClassVar[MethodNeeds]
    """``nothing``: weights only; ``text``: calibration text; ``training``: training text as well."""
    Settings: ClassVar[type[Settings]]
    """Its own keys. Of a method that trains, the property ``training_steps`` says how many optimiser steps it makes."""

    def __init__(self, settings: Any = None) -> None: ...

    def run(self, task: PruningTask) -> Decision:
        """Choose the units that go; within one unit of the task's ratio, the same for the same seed."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A method that cannot do everything that a budget may ask for, and says so before anything slow begins."""

    def check(self, task: PruningTask) -> None:
        """Raise the SecateurError that ``run`` would end with: impossible kinds, groups, settings, adapters.

        Takes a moment, changes nothing, and reads no text: the task has none yet.
        """
        ...


class NoSettings(Settings):
    """This method has no settings of its own."""


def one_shot(task: PruningTask, criterion: Criterion) -> Decision:
    """Score once, cut once: the whole of every one-shot method."""
    scores = score(task, criterion, task.seed)
    return Decision(allocate(task.graph, scores, task.budget), scores)


def score(task: PruningTask, criterion: Criterion, seed: int) -> Scores:
    """Scores of what the budget may cut, computed in the precision that the task trains in."""
    with autocast(task.training.precision, task.model.device):
        return criterion.score(task.model, restrict(task.graph, task.budget), task.calibration, seed)


def adapted_graph(adapted: PeftModel, task: PruningTask) -> DependencyGraph:
    """The graph of the task's model with adapters on; what the task's graph protects is protected in it."""
    traced = trace(adapted)
    groups = tuple(replace(group, protected=task.graph[group.name].protected) for group in traced)
    return replace(traced, groups=groups)

"""The interface of a criterion: frozen settings, and a score for each unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from torch import nn

from secateur.errors import ModelError
from secateur.types import DependencyGraph, Kind, NodeGroup, Scores, Settings
from secateur.walk import Calibration

Needs = Literal["nothing", "activations", "gradients", "adapters"]


class Criterion(Settings, ABC):
    """Scores the importance of each unit. Its fields are its options, each with a default; it has no other state."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    """One line."""
    paper: ClassVar[str] = ""
    """Link to the paper; empty when there is none."""
    needs: ClassVar[Needs] = "nothing"
    """``nothing``: only weights; ``activations``: a forward pass over text; ``gradients``: a backward pass with
    gradients of the weights; ``adapters``: LoRA adapters, their values or the gradients of A and B alone."""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """The kinds of groups that it can score, if not all."""

    @abstractmethod
    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """Score every unit of every prunable group of ``graph``; higher = keep, fp32, on the CPU.

        Args:
            model: the model that ``graph`` was traced from; it is restored exactly.
            graph: groups that must not be scored are protected in it.
            calibration: text; None for a criterion that needs nothing.
            seed: of everything random in the criterion.

        Raises:
            DataError: text is needed and there is none.
            ModelError: a prunable group has no parameter that the criterion can read; the message names it.
        """

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """Raise the ModelError that ``score`` would raise. It is quick, and adapters need not be trained yet."""


def unscorable(group: NodeGroup, criterion: str, reason: str) -> ModelError:
    """The error for a group that a criterion cannot read."""
    return ModelError(
        f"The criterion '{criterion}' cannot score {group.name}: {reason}. "
        f'Choose another method, or protect the group with budget.protect=["{group.name}"].'
    )


def require_gradients(
    graph: DependencyGraph, parameters: Mapping[str, nn.Parameter], wanted: Iterable[str], criterion: str
) -> None:
    """Raise the ``unscorable`` error for the first parameter in ``wanted`` whose type has no gradient."""
    for name in wanted:
        if not parameters[name].is_floating_point():
            group = next(group for group in graph.prunable if name in graph.parameters_of(group))
            raise unscorable(group, criterion, f"{name} is {parameters[name].dtype}, which has no gradient")

"""LLM-Pruner (arXiv 2305.11627): gradient-based structured pruning in one shot, or in a few rounds."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from secateur import importance
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.planning import by_period
from secateur.surgery import masked
from secateur.types import Cut, Scores, Settings


class LLMPrunerSettings(importance.Salience):
    """The criterion, and the number of rounds. Protected layers and the ranking are set in the budget."""

    rounds: int = Field(default=1, ge=1)
    """Number of equal rounds in which units are removed, with new scores in each (``iterative_steps`` of the code)."""


class LLMPruner(Method):
    """Weights times gradients, in the four forms of the paper."""

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"
    summary: ClassVar[str] = "one shot: weights times gradients, first and second order, by vector or by element"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = LLMPrunerSettings
    settings: LLMPrunerSettings

    @property
    def ranks(self) -> bool:
        """See ``Method.ranks``."""
        return self.settings.rounds == 1

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``."""
        return TextRead(gradient=self.settings.rounds)

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        settings = self.settings
        removed: dict[str, list[int]] = {}
        scores: Scores | None = None
        for index in range(settings.rounds):
            with masked(task.model, task.graph, Cut.removing(task.graph, removed)):
                scores = task.score(settings)
            last = index == settings.rounds - 1
            ratio = None if last else by_period(index, settings.rounds) * task.budget.ratio
            removed = task.allocate(scores, removed, ratio)
        return Decision(removed, scores)

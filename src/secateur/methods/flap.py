"""FLAP (arXiv 2312.11983): fluctuation-based adaptive structured pruning, with bias compensation; no training."""

from __future__ import annotations

from typing import ClassVar

from secateur.errors import InputError
from secateur.importance.flap import Fluctuation, compensation
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.planning.shapes import needs_equal_widths
from secateur.types import Settings


class FLAPSettings(Fluctuation):
    """The criterion, and whether the mean of removed channels becomes a bias."""

    compensate: bool = True
    """Add the mean contribution of the removed channels to the bias of the linear that consumed them. A linear without
    a bias gets one, and the folder then needs its modelling file."""


class FLAP(Method):
    """Removes channels whose input hardly fluctuates, and replaces their mean by a bias.

    ::

        budget: {ratio: 0.2, floor: 0}
        method: {name: flap, compensate: true}
        recovery: {steps: 0}
    """

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"
    summary: ClassVar[str] = "one shot: how much a channel fluctuates around its mean, which a bias replaces"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = FLAPSettings
    settings: FLAPSettings

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``."""
        return TextRead(forward=1)

    @property
    def compensates(self) -> bool:
        """See ``Method.compensates``."""
        return self.settings.compensate

    @property
    def ranks(self) -> bool:
        """See ``Method.ranks``."""
        return not self.settings.compensate

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        graph = task.restricted
        moments = self.settings.measure(task.model, graph, task.calibration)
        scores = self.settings.from_moments(task.model, graph, moments)
        removed = task.allocate(scores)
        updates = compensation(task.model, graph, moments, removed) if self.settings.compensate else {}
        return Decision(removed, scores, updates)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: only linears consume the prunable groups, and they may get a bias."""
        super().check(task)
        if self.settings.compensate and needs_equal_widths(task.budget.runs_on):
            raise InputError(
                f"FLAP's biases need a modelling file, which {task.budget.runs_on} does not support. Set "
                "method.compensate=false, or budget.runs_on=transformers."
            )
        self.settings.check(task.model, task.restricted)

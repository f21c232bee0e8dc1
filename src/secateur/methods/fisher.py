"""Fisher information of a switch on each unit, in one shot."""

from __future__ import annotations

from typing import ClassVar

from secateur import importance
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, one_shot


class Fisher(Method):
    """Squared gradients of a switch on each unit, averaged over texts."""

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "https://arxiv.org/abs/1906.10771"
    summary: ClassVar[str] = "one shot: squared derivative of each text's loss by a switch on the unit"
    needs: ClassVar[MethodNeeds] = "text"

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Fisher())

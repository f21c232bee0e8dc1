"""Fisher information of a switch on each unit, in one shot."""

from __future__ import annotations

from typing import ClassVar

from secateur import importance
from secateur.methods.base import Decision, MethodNeeds, NoSettings, PruningTask, one_shot
from secateur.types import Settings


class Fisher:
    """Squared gradients of a switch on each unit, averaged over texts."""

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "https://arxiv.org/abs/1906.10771"
    summary: ClassVar[str] = "one shot: squared derivative of each text's loss by a switch on the unit"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = NoSettings

    def __init__(self, settings: NoSettings | None = None) -> None:
        self.settings = settings or NoSettings()

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Fisher())

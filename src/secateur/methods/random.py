"""Random: the floor. A method that does not beat it after the same recovery is worth nothing."""

from __future__ import annotations

from typing import ClassVar

from secateur import importance
from secateur.methods.base import Decision, MethodNeeds, NoSettings, PruningTask, one_shot
from secateur.types import Settings


class Random:
    """Units are drawn at random, by the seed."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "one shot: units drawn at random; the floor for every comparison"
    needs: ClassVar[MethodNeeds] = "nothing"
    Settings: ClassVar[type[Settings]] = NoSettings

    def __init__(self, settings: NoSettings | None = None) -> None:
        self.settings = settings or NoSettings()

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Random())

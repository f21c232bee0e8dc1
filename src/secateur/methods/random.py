"""Random: the floor. A method that does not beat it after the same recovery is worth nothing."""

from __future__ import annotations

from typing import ClassVar

from secateur import importance
from secateur.methods.base import Decision, Method, PruningTask, one_shot


class Random(Method):
    """Units are drawn at random, by the seed."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "one shot: units drawn at random; the floor for every comparison"

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Random())

"""Magnitude: the units with the smallest weights go; no text."""

from __future__ import annotations

from typing import ClassVar, Literal

from secateur import importance
from secateur.methods.base import Decision, Method, PruningTask, one_shot
from secateur.types import Settings


class MagnitudeSettings(Settings):
    """Which weights of a unit are measured."""

    over: Literal["consumers", "all"] = "consumers"
    """``consumers``: columns of the matrices that consume the unit (magnitude-sp of the FLAP paper); ``all``: every
    weight of the unit (the "L2" of the LLM-Pruner paper)."""


class Magnitude(Method):
    """L2 norms of the weights of a unit."""

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"
    summary: ClassVar[str] = "one shot: L2 norm of the weights that consume a unit; needs no text"
    Settings: ClassVar[type[Settings]] = MagnitudeSettings
    settings: MagnitudeSettings

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Magnitude(over=self.settings.over))

"""Wanda-sp: weights times the activations that they meet, in the structured form."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from secateur import importance
from secateur.methods.base import Decision, MethodNeeds, PruningTask, one_shot
from secateur.types import Settings


class WandaSettings(Settings):
    """How the calibration text is run through the model."""

    batch_size: int = Field(default=4, ge=1)
    """Windows in one forward pass; changes memory, not the result."""


class Wanda:
    """Wanda-sp on the dense model's activations."""

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    summary: ClassVar[str] = "one shot: weights times the size of the activations that they meet (Wanda-sp)"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = WandaSettings

    def __init__(self, settings: WandaSettings | None = None) -> None:
        self.settings = settings or WandaSettings()

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Activation(batch_size=self.settings.batch_size))

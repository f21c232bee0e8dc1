"""First-order Taylor: LLM-Pruner's Element¹ criterion in one shot."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur import importance
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, one_shot
from secateur.types import Settings


class TaylorSettings(Settings):
    """The form of the criterion, and how the calibration text is run through the model."""

    form: Literal["element", "vector"] = "element"
    """``element``: sum of absolute values (Element¹); ``vector``: absolute value of the sum."""
    batch_size: int = Field(default=4, ge=1)
    """Windows in one backward pass; changes memory, not the result."""


class Taylor(Method):
    """Weights times gradients of the language-modelling loss."""

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"
    summary: ClassVar[str] = "one shot: weights times gradients of the loss (LLM-Pruner, first order)"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = TaylorSettings
    settings: TaylorSettings

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        return one_shot(task, importance.Taylor(self.settings.form, self.settings.batch_size))

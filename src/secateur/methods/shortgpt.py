"""ShortGPT (arXiv 2403.03853): whole decoder layers go, those that change the hidden state least."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from secateur.importance.block_influence import BlockInfluence
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, one_shot
from secateur.types import Kind, Settings


class ShortGPTSettings(Settings):
    """How the calibration text is run through the model."""

    batch_size: int = Field(default=4, ge=1)
    """Windows in one forward pass; changes memory, not the result."""


class ShortGPT(Method):
    """Layers in the order of their Block Influence."""

    name: ClassVar[str] = "shortgpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"
    summary: ClassVar[str] = "one shot: whole layers, those that turn the hidden state least"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = ShortGPTSettings
    settings: ShortGPTSettings
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        return one_shot(task, BlockInfluence(self.settings.batch_size))

"""ShortGPT (arXiv 2403.03853): whole decoder layers go, those that change the hidden state least."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from secateur.errors import InputError
from secateur.importance.block_influence import BlockInfluence
from secateur.methods.base import Decision, MethodNeeds, PruningTask, one_shot
from secateur.types import Kind, Settings


class ShortGPTSettings(Settings):
    """How the calibration text is run through the model."""

    batch_size: int = Field(default=4, ge=1)
    """Windows in one forward pass; changes memory, not the result."""


class ShortGPT:
    """Layers in the order of their Block Influence."""

    name: ClassVar[str] = "shortgpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"
    summary: ClassVar[str] = "one shot: whole layers, those that turn the hidden state least (budget.kinds=[layer])"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = ShortGPTSettings
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)
    """What it can cut."""

    def __init__(self, settings: ShortGPTSettings | None = None) -> None:
        self.settings = settings or ShortGPTSettings()

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        return one_shot(task, BlockInfluence(self.settings.batch_size))

    def check(self, task: PruningTask) -> None:
        """See ``Checked.check``: layers, and nothing else."""
        if set(task.budget.kinds) != set(self.kinds):
            raise InputError(
                f"ShortGPT removes whole layers, and the budget allows {', '.join(task.budget.kinds)}. "
                "Set budget.kinds=[layer]."
            )

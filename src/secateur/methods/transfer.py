"""How redundant units are driven out while the adapters train, and the other units learn their function."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState

from secateur.training import StatefulCallback


class Transfer(StatefulCallback):
    """A callback of the Trainer with three hooks; a subclass overrides those that it uses.

    Give it to ``secateur.training.train`` as a callback, and its ``penalty`` as the penalty. Steps are optimiser steps,
    numbered from 0; a resumed run continues the numbering.
    """

    def begin(self, model: PeftModel) -> None:
        """Called when training begins, or resumes from a checkpoint whose state is already restored."""

    def penalty(self, model: PeftModel, step: int) -> torch.Tensor | None:
        """A scalar to add to the model's own loss in this step; None for no penalty."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """Called after the optimiser's step."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """See ``StatefulCallback``: nothing."""
        return {}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """See ``StatefulCallback``."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer when the model is on its device."""
        self.begin(model)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer between the optimiser's step and the next batch."""
        self.after_step(model, state.global_step)  # the Trainer counts the step after this call

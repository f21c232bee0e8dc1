"""What is done, while the adapters train, with the units that go, so that the others learn what these did."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState

from secateur.training import StatefulCallback


class Transfer(StatefulCallback):
    """A callback of the Trainer with three places to act; a subclass fills those that it uses.

    Give it to ``secateur.training.train`` as a callback, and its ``penalty`` as the penalty. Steps are optimiser steps,
    numbered from 0 on; after a resume they go on where they were.
    """

    def begin(self, model: PeftModel) -> None:
        """Training begins, or goes on from a checkpoint whose state has been restored already."""

    def penalty(self, model: PeftModel, step: int) -> torch.Tensor | None:
        """A scalar that is added to the model's own loss in this step; None for nothing."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """The optimiser has made this step."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """See ``StatefulCallback``: nothing."""
        return {}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """See ``StatefulCallback``."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer when the model is where it will be trained."""
        self.begin(model)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer between the optimiser's step and the next batch."""
        self.after_step(model, state.global_step)  # the Trainer counts it a moment later

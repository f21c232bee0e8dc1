"""The transfer of LoRAPrune: scores from the gradients of A and B in every step, masks that only grow.

It reads gradients in ``on_pre_optimizer_step``: by then they are accumulated over the whole batch, unscaled and
all-reduced, and not yet clipped. It masks after the step. Its state is the same on every rank, and is saved with each
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils import get_total_norm
from transformers import TrainerControl, TrainerState

from secateur.errors import InputError, ModelError
from secateur.importance.lora import AdapterGradients, LoRA
from secateur.methods.transfer import Transfer
from secateur.planning import Budget, Problem, countable, solve
from secateur.surgery import InputMasks
from secateur.types import DependencyGraph, Removed, Scores


class GuidedPruning(Transfer):
    """Prunes a model with LoRA adapters while a Trainer trains them (LoRAPrune, Algorithm 1).

    Args:
        graph: of the model that the Trainer trains, traced with the adapters on, and restricted to the budget
            (``planning.restrict``).
        budget: how much is removed in the end, from where, and whether units compete in the whole model or in each
            layer.
        schedule: number of finished optimiser steps → fraction of the budget that is removed, rising from 0 to 1.
        every: optimiser steps between two decisions.
        moving_average: λ of Ḡ ← λ Ḡ + (1 − λ) Ĝ.
        criterion: its options; None for the defaults.

    The masks are kept after training until ``release``. Use it with ``secateur.training.train``, or with a Trainer of
    your own with ``max_grad_norm=0``: the Trainer clips before callbacks run. Clip in a later callback.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        budget: Budget,
        schedule: Callable[[int], float],
        *,
        every: int = 10,
        moving_average: float = 0.9,
        criterion: LoRA | None = None,
    ) -> None:
        self.graph, self.budget, self.schedule = countable(graph), budget, schedule
        """The graph has no shapes of the adapters: these will be merged, and do not count."""
        self.every, self.moving_average, self.criterion = every, moving_average, criterion or LoRA()
        self.removed: Removed = {}
        """Group name → units that are masked now, ascending."""
        self.average: dict[str, torch.Tensor] = {}
        """Ḡ: group name → moving average of the scores, which starts at zero."""
        self.observed = 0
        """Steps in the moving average."""
        self.skipped = 0
        """Steps that were left out because their gradients were not finite."""
        self._done = False
        self._masks: InputMasks | None = None
        self._gradients: AdapterGradients | None = None
        self._parameters: list[torch.nn.Parameter] = []

    @property
    def scores(self) -> Scores:
        """The current moving averages, corrected for their start at zero.

        Starting from the first scores instead would give these too much weight for long, and they are the least
        reliable ones (B = 0).
        """
        share = 1 - self.moving_average**self.observed
        return Scores({name: value / share for name, value in self.average.items()}, self.criterion.of_loss)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check that the Trainer does not clip before callbacks, and begin."""
        if args.max_grad_norm:
            raise InputError(
                f"LoRAPrune reads gradients before they are clipped, and this Trainer clips first (max_grad_norm="
                f"{args.max_grad_norm}). Set max_grad_norm=0 and clip in a callback after this one."
            )
        super().on_train_begin(args, state, control, model)

    def begin(self, model: PeftModel) -> None:
        """Check that gradients can be read, and apply the masks of a restored checkpoint."""
        self._gradients = AdapterGradients(model, self.graph, self.criterion)
        self._parameters = list(model.parameters())
        self._masks = InputMasks(model, self.graph)
        self._masks.remove(self.removed)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the scores of the whole batch's gradients to the moving averages."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # one number, to wait for a GPU once; the largest value, as squares of finite numbers need not be finite
        if not get_total_norm(gradients, float("inf")).isfinite():
            self.skipped += 1
            for gradient in gradients:  # one step of NaN would be the end of all adapters
                gradient.zero_()
            return
        if self._done:
            return
        assert self._gradients is not None
        now = self._gradients.scores()
        self.observed += 1
        for name in now:
            before = self.average.get(name, torch.zeros_like(now[name]))
            self.average[name] = before.lerp(now[name], 1 - self.moving_average)

    def after_step(self, model: PeftModel, step: int) -> None:
        """Mask the next units, when a decision is due."""
        finished = step + 1
        fraction = self.schedule(finished)
        if not self._done and fraction > 0 and (finished % self.every == 0 or fraction == 1.0):
            self._decide(fraction)
            self._done = fraction == 1.0

    def _decide(self, fraction: float) -> None:
        if not self.average:
            raise ModelError(
                f"None of the {self.skipped} steps so far had finite gradients, therefore no unit can be ranked. Train "
                "in fp32 or bf16, or lower the learning rate."
            )
        ratio = None if fraction == 1.0 else fraction * self.budget.ratio
        self.removed = solve(Problem.of(self.graph, self.scores, self.budget, self.removed), ratio)
        assert self._masks is not None
        self._masks.remove(self.removed)

    def release(self) -> None:
        """Remove the masks from the model."""
        if self._masks is not None:
            self._masks.remove({})

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Moving averages, and masks as 0 and 1."""
        tensors = {f"average/{name}": value for name, value in self.average.items()}
        for name, units in self.removed.items():
            mask = torch.ones(self.graph[name].size, dtype=torch.uint8)
            mask[units] = 0
            tensors[f"mask/{name}"] = mask
        return tensors | {"counts": torch.tensor([self.observed, self.skipped, int(self._done)])}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state from ``state_tensors``."""
        self.observed, self.skipped, done = tensors["counts"].tolist()
        self._done = bool(done)
        self.average = _below("average/", tensors)
        self.removed = {
            name: (mask == 0).nonzero().flatten().tolist() for name, mask in _below("mask/", tensors).items()
        }


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

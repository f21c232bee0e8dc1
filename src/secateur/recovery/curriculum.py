"""Dynamic knowledge recovery (LoRAShear, arXiv 2310.18356, Algorithm 5): sources with a larger loss are read more.

Before the first step and after every round, the loss on held-out text of each source is compared with the dense model's
loss. The weight of a source grows with the difference. The paper gives no formula; this is Sheared LLaMA's (arXiv
2310.06694, Algorithm 1), with a floor. The first stage reads pretraining-like sources, the second one instructions.
Both are one run of the Trainer: only the order of reading changes, and optimiser and learning-rate schedule continue.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from secateur import progress
from secateur.data.order import ReadingOrder
from secateur.errors import ModelError
from secateur.training import StatefulCallback

Losses = Mapping[str, float]
Measure = Callable[[Any], Losses]


def reweigh(weights: Losses, losses: Losses, reference: Losses) -> dict[str, float]:
    """``w_s · exp(max(0, loss_s − ref_s))``, normalised; a source without losses counts as not behind.

    Args:
        weights: previous weights; the result has the same sources.
        losses: present losses by source, nats.
        reference: the dense model's losses on the same text.

    Raises:
        ModelError: a loss is not finite.
    """
    for whose, found in (("The model that is trained", losses), ("The dense model", reference)):
        broken = sorted(name for name, loss in found.items() if not math.isfinite(loss))
        if broken:
            raise ModelError(
                f"{whose} has no finite loss on {', '.join(broken)}, and the shares of recovery cannot be computed. "
                "Set training.precision=fp32 or a lower training.learning_rate; recovery.round_steps=0 switches the "
                "measurement off."
            )
    behind = {
        name: max(0.0, losses[name] - reference[name]) if name in losses and name in reference else 0.0
        for name in weights
    }
    most = max(behind.values())  # a common factor does not matter, and a broken model's would overflow
    grown = {name: weight * math.exp(behind[name] - most) for name, weight in weights.items()}
    total = sum(grown.values())
    return {name: weight / total for name, weight in grown.items()}


def floored(weights: Losses, floor: float) -> dict[str, float]:
    """Shares with sum one, none below ``floor`` (at most 1 / their number); those above it keep their proportions."""
    if floor * len(weights) >= 1 - 1e-9:
        return dict.fromkeys(weights, 1 / len(weights))
    low: set[str] = set()
    while True:
        rest = sum(weight for name, weight in weights.items() if name not in low)
        scale = (1 - floor * len(low)) / rest
        below = {name for name in weights if name not in low and weights[name] * scale < floor}
        if not below:
            return {name: floor if name in low else weight * scale for name, weight in weights.items()}
        low |= below


def _agreed(losses: Losses, device: torch.device) -> dict[str, float]:
    """The mean of the losses over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(losses)
    values = torch.tensor(list(losses.values()), device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(losses, (values / torch.distributed.get_world_size()).tolist(), strict=True))


@dataclass(frozen=True)
class RecoveryStage:
    """A part of the training with its own sources."""

    name: str
    sources: tuple[str, ...]
    """Sources to learn. Sources of earlier stages keep the floor, or they would be forgotten."""
    until: int
    """Last step of the stage; it may end earlier."""


@dataclass(eq=False)
class Curriculum(StatefulCallback):
    """Sets the weights of a ``ReadingOrder`` at the beginning of each stage and between rounds.

    A stage ends at its last step, or when ``patience`` rounds in a row did not lower the mean loss of its sources below
    the best of the stage by ``min_gain`` (relative). The training ends with the last stage.
    """

    order: ReadingOrder
    stages: Sequence[RecoveryStage]
    initial: Losses
    """Weights of the sources at the beginning of a stage."""
    round_steps: int = 0
    """Steps between two measurements; 0 measures nothing, and the weights of a stage are constant."""
    floor: float = 0.02
    min_gain: float = 0.005
    patience: int = 2
    """0: continue to the last step with any gain."""
    measure: Measure | None = None
    """Returns the loss of a model by source, on text that is neither trained on nor evaluated."""
    reference: Losses = field(default_factory=dict)
    """The dense model's losses on the same text."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Record of every round: step, stage, ``losses`` and ``weights`` by source."""

    def __post_init__(self) -> None:
        self._stage, self._began, self._idle = 0, 0, 0
        self._best = math.inf
        self._batch = 0
        self._weights = self._beginning(0)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer. A resumed run already has its rounds."""
        self._batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.global_step == 0:
            self._round(0, model)
            self._look_ahead(0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        """Called by the Trainer after every optimiser step."""
        step = state.global_step
        if step >= self.stages[-1].until:
            return
        due = self.round_steps > 0 and (step - self._began) % self.round_steps == 0
        if step >= self.stages[self._stage].until:
            self._next_stage(step, model)
        elif due and self._round(step, model) and not self._next_stage(step, model):
            self.rounds[-1]["stopped"] = f"no gain of {self.min_gain:.1%} in {self.patience} rounds"
            progress.say(f"  Recovery stops after step {step}: {self.rounds[-1]['stopped']}")
            control.should_training_stop = True
            control.should_save = False  # a run resumed from a checkpoint of this step would continue
        self._look_ahead(step)

    def _beginning(self, stage: int) -> dict[str, float]:
        return {name: self.initial[name] for name in self.stages[stage].sources}

    def _look_ahead(self, step: int) -> None:
        """The planned end of a stage is known a step before it, in time for the next one to be read from its start."""
        until = self.stages[self._stage].until
        if step + 1 != until or self._stage + 1 >= len(self.stages):
            return
        following = self._stage + 1
        self.order.set_weights(self._shares(following, self._beginning(following)), until * self._batch)

    def _next_stage(self, step: int, model: Any) -> bool:
        """Whether there was one more stage, which begins now."""
        if self._stage + 1 >= len(self.stages):
            return False
        self._stage, self._began, self._idle, self._best = self._stage + 1, step, 0, math.inf
        self._weights = self._beginning(self._stage)
        self._round(step, model)
        return True

    def _round(self, step: int, model: Any) -> bool:
        """Measure, set the weights; whether the stage no longer helps."""
        stage = self.stages[self._stage]
        losses: dict[str, float] = {}
        if self.measure is not None and self.round_steps > 0:
            losses = _agreed(self.measure(model), next(model.parameters()).device)
            self._weights = reweigh(self._weights, losses, self.reference)
        shares = self._shares(self._stage, self._weights)
        # the floor is part of the weights: a source that was ahead can regain weight soon
        self._weights = {name: shares[name] for name in stage.sources}
        # the batch of the next step may have been requested already, in part, and not by all processes
        self.order.set_weights(shares, (step + 1) * self._batch if step > 0 else 0)
        self.rounds.append({"step": step, "stage": stage.name, "weights": shares, "losses": losses})
        return self._no_longer_helps([losses[name] for name in stage.sources if name in losses])

    def _shares(self, stage: int, weights: Losses) -> dict[str, float]:
        """Shares of all sources that are read in a stage: its own by weight, earlier ones the floor."""
        earlier = [name for other in self.stages[:stage] for name in other.sources if name not in weights]
        return floored(dict.fromkeys(earlier, 0.0) | dict(weights), self.floor)

    def _no_longer_helps(self, losses: Sequence[float]) -> bool:
        if not losses or self.patience == 0:
            return False
        mean = sum(losses) / len(losses)
        gained = mean < self._best * (1 - self.min_gain)
        self._idle = 0 if gained else self._idle + 1
        self._best = min(self._best, mean)  # the round before says nothing when losses go up and down
        return self._idle >= self.patience

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The order of reading and everything that was measured, as part of a checkpoint."""
        note = {
            "stage": self._stage,
            "began": self._began,
            "idle": self._idle,
            "best": self._best,
            "weights": self._weights,
            "rounds": self.rounds,
        }
        text = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
        return {"note": text, **{f"order.{name}": tensor for name, tensor in self.order.state().items()}}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state from ``state_tensors``."""
        note = json.loads(bytes(tensors["note"].tolist()).decode())
        self._stage, self._began, self._idle = note["stage"], note["began"], note["idle"]
        self._best, self._weights, self.rounds = note["best"], note["weights"], note["rounds"]
        self.order.load_state({name.partition(".")[2]: tensors[name] for name in tensors if name.startswith("order.")})

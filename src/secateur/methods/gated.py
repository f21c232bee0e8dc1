"""A frozen model with one learnt gate for each unit: the module that a Trainer trains, and its loss.

Gates, Lagrange multipliers and adapters are its only parameters, and the only part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState

from secateur.evaluation import divergence
from secateur.surgery import InputGates
from secateur.types import Removed, Scores

_POSITIONS_PER_CHUNK = 512
_LOWEST = -0.1
"""A gate is not driven further below zero, so that it can come back (DDP)."""


def kept_score(multiplier: torch.Tensor, threshold: float) -> torch.Tensor:
    """DDP's soft score: 0 for a unit that is removed, 1 for one that is kept, 0.5 at the threshold.

    ``clamp(1.2 σ(2.4 (m − μ) / μ) − 0.1, 0, 1)``; the gradient is that without the clamp.
    """
    soft = 1.2 * torch.sigmoid(2.4 * (multiplier - threshold) / threshold) - 0.1
    return soft + (soft.clamp(0, 1) - soft).detach()


def threshold_at(progress: float, last: float) -> float:
    """μ at a fraction of all steps: from 0.5 to ``last``, with the square root of ``progress``."""
    return 0.5 - (0.5 - last) * math.sqrt(progress)


class Gated(nn.Module):
    """The model with gates. Its forward pass returns the loss of DDP (arXiv 2603.08065).

    ``CE + distillation · KL(dense || gated) + λ₁ (q − ρ) + λ₂ (q − ρ)² + λ₃ mean s (1 − s)``, where q is the removed
    share of the parameters of all units, by their soft scores s. The dense model is the same one with gates at 1 and
    adapters off. The λ start at 0 and ascend.

    Args:
        model: the model, with its weights frozen and in eval mode.
        gates: on ``model``.
        start: group name → the first z of each unit.
        costs: group name → parameters removed with a unit.
        target: ρ.
        distillation: 0 leaves out the dense pass.
        last_threshold: μ in the last step.
        adapted: ``model`` with adapters, which train as well; None without any.
    """

    frozen: Any
    adapted: Any
    alive: torch.Tensor
    """``[units of all groups]``: 0 for a unit that is chosen, 1 for any other."""
    ranked: torch.Tensor
    """``[units of all groups]``: z when the choice was made."""
    reached: torch.Tensor
    """q when the choice was made; NaN before."""

    def __init__(
        self,
        model: Any,
        gates: InputGates,
        start: Mapping[str, torch.Tensor],
        costs: Mapping[str, int],
        *,
        target: float,
        distillation: float,
        last_threshold: float,
        adapted: Any = None,
    ) -> None:
        super().__init__()
        # not as submodules: checkpoints have only what is trained
        self.__dict__.update(frozen=model, adapted=adapted)
        self.inputs, self.target, self.distillation = gates, target, distillation
        self.last_threshold, self.progress = last_threshold, 0.0
        """``progress``: fraction of the steps before the choice."""
        device = next(model.parameters()).device
        self.names = list(start)
        self.z = nn.ParameterList(nn.Parameter(start[name].to(device, torch.float32)) for name in self.names)
        self.lambdas = nn.Parameter(torch.zeros(2, device=device))
        """λ₁ and λ₃."""
        self.quadratic = nn.Parameter(torch.zeros(1, device=device))
        """λ₂."""
        trained = [] if adapted is None else [one for one in adapted.parameters() if one.requires_grad]
        self.adapters = nn.ParameterList(trained)
        self.register_buffer("alive", torch.ones(sum(z.numel() for z in self.z), device=device))
        self.register_buffer("ranked", torch.zeros_like(self.alive))
        self.register_buffer("reached", torch.full((), float("nan"), device=device))
        share = [
            torch.full(z.shape, float(costs[name]), device=device) for name, z in zip(self.names, self.z, strict=True)
        ]
        self.shares = [part / float(torch.cat(share).sum()) for part in share]

    @property
    def config(self) -> Any:
        """That of the model, which the Trainer looks at."""
        return self.frozen.config

    @property
    def chosen(self) -> bool:
        """Whether the units to remove are chosen; from then on there is no constraint."""
        return not bool(self.reached.isnan())

    @property
    def removed(self) -> Removed:
        """The chosen units: group name → units, ascending; only groups that lose some."""
        gone = {
            name: (alive == 0).nonzero().flatten().tolist() for name, alive in zip(self.names, self._alive, strict=True)
        }
        return {name: units for name, units in gone.items() if units}

    @torch.no_grad()
    def choose(self, removed: Removed) -> None:
        """Remove these units for good."""
        self.ranked.copy_(torch.cat(list(self.z)))
        self.reached.copy_(self.removed_share(self.scores()))
        for name, alive in zip(self.names, self._alive, strict=True):
            alive[removed.get(name, [])] = 0.0

    @property
    def _alive(self) -> list[torch.Tensor]:
        """Views of ``alive`` by group."""
        return list(self.alive.split([len(z) for z in self.z]))

    def multipliers(self) -> dict[str, torch.Tensor]:
        """ReLU(z) of each unit, by group, 0 for chosen ones; the gradient passes straight through the ReLU."""
        return {
            name: alive * (z + (z.relu() - z).detach())
            for name, z, alive in zip(self.names, self.z, self._alive, strict=True)
        }

    def scores(self) -> list[torch.Tensor]:
        """The soft scores s of all groups at the current threshold."""
        threshold = threshold_at(self.progress, self.last_threshold)
        return [kept_score(multiplier, threshold) for multiplier in self.multipliers().values()]

    def gate_scores(self) -> Scores:
        """z as scores, that of the choice once it is made.

        s rises with z, but is 0 or 1 for many units, and z tells these apart.
        """
        z = self.ranked if self.chosen else torch.cat(list(self.z)).detach()
        parts = z.cpu().split([len(part) for part in self.z])
        return Scores(dict(zip(self.names, parts, strict=True)), on_one_scale=True)

    def removed_share(self, scores: Iterable[torch.Tensor]) -> torch.Tensor:
        """q: the removed share of the parameters of all units."""
        kept = [(score * share).sum() for score, share in zip(scores, self.shares, strict=True)]
        return 1 - torch.stack(kept).sum()

    def constraint(self) -> torch.Tensor:
        """The terms with a λ. Descent on them ascends the λ."""
        scores = self.scores()
        missing = self.removed_share(scores) - self.target
        undecided = torch.cat([score * (1 - score) for score in scores]).mean()
        first, third = 2 * self.lambdas.detach() - self.lambdas
        second = (2 * self.quadratic.detach() - self.quadratic).squeeze()
        return first * missing + second * missing.square() + third * undecided

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean loss of a micro-batch, ``[n, window]``."""
        wanted = self._dense(input_ids) if self.distillation > 0 else None
        self.inputs.set(self.multipliers())
        logits = self.frozen(input_ids=input_ids, use_cache=False).logits
        loss = token_loss(logits, wanted, labels, self.distillation)
        return {"loss": loss if self.chosen else loss + self.constraint()}

    @torch.no_grad()
    def _dense(self, ids: torch.Tensor) -> torch.Tensor:
        self.inputs.set(None)
        with nullcontext() if self.adapted is None else self.adapted.disable_adapter():
            logits: torch.Tensor = self.frozen(input_ids=ids, use_cache=False).logits
        return logits


class GateSteps(TrainerCallback):
    """Moves the threshold, keeps the gates in their range, and makes the choice.

    Args:
        choose: scores of all units → the units to remove.
        choose_at: number of steps before the choice. Afterwards the kept gates are learnt anew, from 1.
        highest: gates are not driven above it.
    """

    def __init__(
        self,
        gated: Gated,
        optimizer: torch.optim.Optimizer,
        choose: Callable[[Scores], Removed],
        choose_at: int,
        highest: float,
    ) -> None:
        self.gated, self.optimizer, self.choose = gated, optimizer, choose
        self.choose_at, self.highest = choose_at, highest

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Lower the threshold, or choose."""
        if state.global_step < self.choose_at:
            self.gated.progress = (state.global_step + 1) / self.choose_at
        elif not self.gated.chosen:
            self.finish()
            with torch.no_grad():
                for z in self.gated.z:
                    z.fill_(1.0)
                    self.optimizer.state.pop(z, None)  # the constraint's gradients say nothing any more

    def finish(self) -> None:
        """Choose by the gates as they are, if that has not happened."""
        self.gated.progress = 1.0
        if not self.gated.chosen:
            self.gated.choose(self.choose(self.gated.gate_scores()))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer after the optimiser's step."""
        for z in self.gated.z:
            z.clamp_(_LOWEST, self.highest)

    @torch.no_grad()
    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Add q to the entry, while it is not fixed."""
        if logs and "loss" in logs and not self.gated.chosen:
            state.log_history[-1]["removed_share"] = float(self.gated.removed_share(self.gated.scores()))


def token_loss(
    logits: torch.Tensor, wanted: torch.Tensor | None, ids: torch.Tensor, distillation: float
) -> torch.Tensor:
    """``CE + distillation · KL(p || q)``, mean over the predicted tokens, float32.

    Args:
        logits: of q, ``[n, window, vocabulary]``.
        wanted: logits of p; None leaves the second term out.
        ids: ``[n, window]``.
    """
    student = logits[:, :-1].flatten(0, 1).split(_POSITIONS_PER_CHUNK)
    teacher = [None] * len(student) if wanted is None else wanted[:, :-1].flatten(0, 1).split(_POSITIONS_PER_CHUNK)
    targets = ids[:, 1:].flatten()
    losses = []
    for q, p, target in zip(student, teacher, targets.split(_POSITIONS_PER_CHUNK), strict=True):
        log_q = q.float().log_softmax(-1)
        losses.append(F.nll_loss(log_q, target, reduction="sum"))
        if p is not None:
            log_p = p.float().log_softmax(-1)
            losses.append(distillation * divergence(log_p, log_q))
    return torch.stack(losses).sum() / len(targets)

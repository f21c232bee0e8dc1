"""DDP (arXiv 2603.08065): one learnt gate for each unit of a frozen model, under a soft budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pydantic import Field

from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.methods.gated import Gated, GateSteps
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.planning import Problem, ranking
from secateur.surgery import InputGates, folded
from secateur.training import Schedule, attach_lora, train
from secateur.training.quantised import BaseWeights, check_quantisable, quantised_base
from secateur.types import Settings
from secateur.units import effective_weight
from secateur.walk import borrowed, recomputed

_BOUNDARY = 0.7
"""The gate at the start between the units that the scores would remove and the others."""
_MOMENTUM = 0.8
"""β₁ of the gates. With 0.9, in tens of steps, the removed share overshoots its target by a sixth."""
_SECOND = 20.0
"""Learning rate of λ₂, in those of λ₁ (0.4 and 0.02 in the paper)."""


class DDPSettings(Settings):
    """The gates, their start and their training. Steps are optimiser steps. The text is that of the recipe's
    ``recovery`` section."""

    steps: int = Field(default=40, ge=1)
    """T: steps of training, all phases together (1,000 in the paper)."""
    settle: float = Field(default=0.25, ge=0, lt=1)
    """Fraction of the steps at the end, after the choice: the removed units are gone, and the gates of the kept ones
    are learnt anew from 1. With 0, as in the paper, the choice is made at the end, and gates are kept as they are."""
    learning_rate: float = Field(default=0.025, gt=0)
    """Learning rate of the gates (0.02 in the paper). A gate moves by at most about this in a step."""
    multiplier_rate: float = Field(default=2.0, gt=0)
    """Learning rate of the Lagrange multipliers λ₁ and λ₃; that of λ₂ is 20 times as large (0.02 and 0.4 in the paper,
    which has 25 times as many steps)."""
    schedule: Schedule = "constant"
    """Learning-rate schedule of gates and multipliers (cosine in the paper)."""
    distillation: float = Field(default=2.0, ge=0)
    """Weight of KL(dense model || gated model) beside the cross-entropy. Above 0, each step has one more forward
    pass."""
    threshold: float = Field(default=0.1, gt=0, le=0.5)
    """μ_T: the gate at which a unit counts as half removed in the last step; 0.5 in the first."""
    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria with their weights, as in lorashear. Gates start by the rank of a unit's score."""
    lowest: float = Field(default=0.3, gt=0, le=0.7)
    """Gate at the start of the unit with the lowest score. It rises to 0.7 for the last unit that the scores alone
    would remove."""
    highest: float = Field(default=1.0, ge=0.7)
    """Gate at the start of the unit with the highest score (1 for all units in the paper)."""
    amplify: bool = True
    """Whether gates may exceed 1."""
    lora: bool = False
    """Train adapters in the same loop, at half of ``training.learning_rate``."""
    base: BaseWeights = "as-is"
    """Frozen weights during training: as they are loaded, or in 8 (``int8``) or 4 bits (``nf4``) by bitsandbytes."""


class DDP(Method):
    """Learns by how much each unit is multiplied, while a penalty drives the rest to zero; the weights are frozen.

    ::

        budget: {ratio: 0.2}
        method: {name: ddp, steps: 40}
        recovery: {steps: 180}
    """

    name: ClassVar[str] = "ddp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.08065"
    summary: ClassVar[str] = "learnt gates: one multiplier for each unit, trained under a soft budget; weights frozen"
    needs: ClassVar[MethodNeeds] = "training"
    repairable: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = DDPSettings
    settings: DDPSettings

    @property
    def training_steps(self) -> int:
        """See ``Method.training_steps``."""
        return self.settings.steps

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: scores for the start, and the dense model's predictions in every step."""
        dense = self.settings.steps if self.settings.distillation > 0 else 0
        return replace(Saliency(self.settings.saliency).reading, dense_steps=dense)

    @property
    def compensates(self) -> bool:
        """See ``Method.compensates``."""
        return True

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``. The gates, and adapters if any, are in the updates; the model is restored."""
        assert task.training_blocks is not None
        settings = self.settings
        self.check(task)
        start = self._start(task)
        with borrowed(task.model), ExitStack() as stack:
            adapted = self._adapted(task, stack)
            base = quantised_base(adapted or task.model, settings.base)
            with base, InputGates(task.model, task.restricted, start) as gates:
                gated = self._gated(task, gates, start, adapted)
                optimizer = self._optimizer(gated, task)
                choose_at = settings.steps - round(settings.settle * settings.steps)
                highest = math.inf if settings.amplify else 1.0
                steps = GateSteps(gated, optimizer, task.allocate, choose_at, highest)
                with recomputed(task.model, task.training.gradient_checkpointing):
                    log = train(
                        gated,
                        task.training_blocks.ids,
                        task.training.model_copy(
                            update={"gradient_checkpointing": False, "schedule": settings.schedule}
                        ),
                        steps=settings.steps,
                        seed=task.seed + 1,  # another order than that of recovery, which trains with the seed itself
                        description="learning gates",
                        callbacks=[steps],
                        optimizer=optimizer,
                        checkpoints=task.work,
                    )
                steps.finish()
            entries = [{"stage": "gates", **entry} for entry in log]
            for entry in entries:
                task.log(entry)
            return _decision(task, gated, entries)

    def _start(self, task: PruningTask) -> dict[str, torch.Tensor]:
        """z of each unit by the rank of its score: from ``lowest`` to ``_BOUNDARY`` among the units that the scores
        would remove, and from there to ``highest`` among the others."""
        settings = self.settings
        scores = Saliency(settings.saliency).first_scores(task)
        ranks, removed = ranking(Problem.of(task.restricted, scores, task.budget)), task.allocate(scores)
        places, sizes = torch.cat(list(ranks.values())), [len(units) for units in ranks.values()]
        gone = torch.zeros(len(places), dtype=torch.bool)
        for name, part in zip(ranks, gone.split(sizes), strict=True):
            part[removed.get(name, [])] = True
        gates = torch.empty(len(places))
        highest = settings.highest if settings.amplify else min(settings.highest, 1.0)
        for units, first, last in ((gone, settings.lowest, _BOUNDARY), (~gone, _BOUNDARY, highest)):
            order = units.nonzero().flatten()[places[units].argsort()]
            gates[order] = torch.linspace(first, last, len(order))
        # checkpoints do not hold parts of a larger tensor
        return {name: part.clone() for name, part in zip(ranks, gates.split(sizes), strict=True)}

    def _adapted(self, task: PruningTask, stack: ExitStack) -> PeftModel | None:
        """Adapters on the task's model until the stack ends; None when there are none to train."""
        if not self.settings.lora:
            return None
        adapted = attach_lora(task.model, task.lora, task.seed)
        stack.callback(adapted.unload)
        return adapted.eval()

    def _gated(
        self, task: PruningTask, gates: InputGates, start: Mapping[str, torch.Tensor], adapted: PeftModel | None
    ) -> Gated:
        graph, settings = task.restricted, self.settings
        costs = {name: graph.unit_cost(graph[name]) for name in start}
        prunable = sum(costs[name] * graph[name].size for name in start)
        return Gated(
            task.model,
            gates,
            start,
            costs,
            target=task.budget.ratio * graph.parameter_count() / prunable,
            distillation=settings.distillation,
            last_threshold=settings.threshold,
            adapted=adapted,
        )

    def _optimizer(self, gated: Gated, task: PruningTask) -> torch.optim.Optimizer:
        settings = self.settings
        groups: list[dict[str, Any]] = [
            {"params": list(gated.z), "lr": settings.learning_rate, "betas": (_MOMENTUM, 0.999)},
            {"params": [gated.lambdas], "lr": settings.multiplier_rate},
            {"params": [gated.quadratic], "lr": _SECOND * settings.multiplier_rate},
        ]
        if len(gated.adapters):
            groups.append({"params": list(gated.adapters), "lr": task.training.learning_rate / 2})
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: linears consume every group, and no criterion needs adapters."""
        super().check(task)
        Saliency(self.settings.saliency).check_plain(task, self.name)
        with InputGates(task.model, task.restricted, [group.name for group in task.prunable]):
            check_quantisable(task.model, self.settings.base)


def _decision(task: PruningTask, gated: Gated, entries: list[dict[str, Any]]) -> Decision:
    removed = gated.removed
    # the columns of removed units keep their values
    multipliers = {name: m.detach().clone() for name, m in gated.multipliers().items()}
    for name, units in removed.items():
        multipliers[name][units] = 1.0
    updates = {**_adapted_weights(task), **folded(task.model, task.restricted, multipliers)}
    metrics = {"training": entries, "target_share": gated.target, "removed_share": float(gated.reached)}
    return Decision(removed, gated.gate_scores(), updates, metrics)


def _adapted_weights(task: PruningTask) -> dict[str, torch.Tensor]:
    """The weights with an adapter, merged, by their path in the plain model."""
    layers = {name: module for name, module in task.model.named_modules() if isinstance(module, LoraLayer)}
    return {f"{name}.weight": effective_weight(task.model, f"{name}.weight") for name in layers}

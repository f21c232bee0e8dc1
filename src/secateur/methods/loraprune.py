"""LoRAPrune (arXiv 2305.18403): pruning during LoRA training, guided by the gradients of A and B alone."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self, cast

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from secateur.graph.twin import twin_of
from secateur.importance.lora import AdapterGradients, LoRA
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead, adapted_graph
from secateur.methods.guided import GuidedPruning
from secateur.planning import cubic
from secateur.surgery.mask import require_maskable
from secateur.training import Schedule, attach_lora, merge_lora, train
from secateur.training.quantised import BaseWeights, check_quantisable, quantised_base
from secateur.types import Settings


class LoRAPruneSettings(LoRA):
    """Criterion and schedule. Steps are optimiser steps. The text is that of the recipe's ``recovery`` section."""

    steps: int = Field(default=80, ge=1)
    """T: steps of LoRA training in which the masks grow."""
    every: int = Field(default=1, ge=1)
    """Steps between two decisions (10 in the paper's code, which trains for thousands of steps). With fewer steps in
    all, each decision removes more units at once, which costs quality."""
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps at the beginning without pruning."""
    cool_down: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps at the end, after the last decision."""
    moving_average: float = Field(default=0.9, ge=0, lt=1)
    """λ: weight of the past in the moving average of the scores."""
    schedule: Schedule = "constant"
    """Learning-rate schedule during pruning; recovery, which ends the training, has ``training.schedule``."""
    base: BaseWeights = "as-is"
    """Frozen weights during pruning: as they are loaded, or in 8 (``int8``) or 4 bits (``nf4``) by bitsandbytes."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warm_up + self.cool_down >= 1:
            raise ValueError("warm_up and cool_down are fractions of the same steps; together they must be below 1")
        return self


class LoRAPrune(Method):
    """Trains LoRA, and every few steps masks the units with the lowest averaged scores, by a cubic schedule.

    ::

        budget: {ratio: 0.2, protect_first: 0.1, protect_last: 1}
        method: {name: loraprune, steps: 80}
        recovery: {steps: 140}
    """

    name: ClassVar[str] = "loraprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.18403"
    summary: ClassVar[str] = "progressive: masks grow while LoRA trains, scored by the gradients of A and B alone"
    needs: ClassVar[MethodNeeds] = "training"
    changes_weights: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = LoRAPruneSettings
    settings: LoRAPruneSettings

    @property
    def training_steps(self) -> int:
        """See ``Method.training_steps``."""
        return self.settings.steps

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: it trains, and reads no calibration text."""
        return TextRead()

    def run(self, task: PruningTask) -> Decision:
        """Changes the weights of ``task.model`` in place (the adapters are merged), not their shapes."""
        assert task.training_blocks is not None
        settings = self.settings
        adapted = attach_lora(task.model, task.lora, task.seed)
        pruning = GuidedPruning(
            adapted_graph(adapted, task),
            task.budget,
            partial(cubic, steps=settings.steps, warm_up=settings.warm_up, cool_down=settings.cool_down),
            every=settings.every,
            moving_average=settings.moving_average,
            criterion=settings,
        )
        with quantised_base(adapted, settings.base):
            log = train(
                adapted,
                task.training_blocks.ids,
                task.training.model_copy(update={"schedule": settings.schedule}),
                steps=settings.steps,
                seed=task.seed + 1,  # another order than that of recovery, which trains with the seed itself
                description="pruning",
                callbacks=[pruning],
                checkpoints=task.work,
            )
        pruning.release()
        merge_lora(adapted)
        entries: list[dict[str, Any]] = [{"stage": "pruning", **entry} for entry in log]
        for entry in entries:
            task.log(entry)
        metrics = {"training": entries, "skipped_steps": pruning.skipped}
        return Decision(removed=pruning.removed, scores=pruning.scores, metrics=metrics)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: every group can be masked, and has a matrix with an adapter.

        Tested on a twin that shares the weights.
        """
        super().check(task)
        require_maskable(task.prunable)
        adapted = attach_lora(cast(PreTrainedModel, twin_of(task.model, weights=True)), task.lora, task.seed)
        check_quantisable(adapted, self.settings.base)
        AdapterGradients(adapted, adapted_graph(adapted, task), self.settings)

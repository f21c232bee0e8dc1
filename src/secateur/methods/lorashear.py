"""LoRAShear (arXiv 2310.18356): progressive structured pruning guided by LoRA, Algorithm 4."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import ClassVar, Literal, Self, cast

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from secateur.graph.twin import twin_of
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead, adapted_graph
from secateur.methods.lhspg import Decay, HalfSpace, check_norms, still_consumed
from secateur.methods.periods import Period, Periods, PeriodSettings
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.methods.transfer import Transfer
from secateur.surgery.mask import require_maskable
from secateur.training import attach_lora
from secateur.types import DependencyGraph, Settings


class LoRAShearSettings(PeriodSettings):
    """The schedule, the way units shrink, and the criteria that rank them."""

    projection: Literal["decay", "half-space"] = "decay"
    """How redundant units reach zero: ``decay`` (released optimiser) or ``half-space`` (paper)."""
    epsilon: float = Field(default=0.0, ge=0.0, lt=1.0)
    """ε of the half-space projection: a larger ε zeroes units earlier. It must be 0 with ``decay``."""
    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria that rank the units in every period, with their weights. A mapping in place of a weight gives a
    criterion's own options: ``{lora: {weight: 0.5, sides: both}}``."""

    @model_validator(mode="after")
    def _epsilon_is_used(self) -> Self:
        if self.epsilon and self.projection == "decay":
            raise ValueError("epsilon belongs to projection=half-space; with decay it must be 0")
        return self

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        readers = Saliency(self.saliency).readers
        if readers and self.warmup_steps == 0:
            raise ValueError(
                f"saliency by {', '.join(readers)} reads adapters, and there are none before the first period; set "
                "warmup_steps above 0"
            )
        return self


class LoRAShear(Method):
    """Trains LoRA in periods. In each, it scores, chooses the next units, and shrinks them to zero while the rest
    learns.

    ::

        budget: {ratio: 0.2}
        method: {name: lorashear, periods: 1, period_steps: 80, saliency: {fisher: 1.0}}
        recovery: {steps: 140}
    """

    name: ClassVar[str] = "lorashear"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.18356"
    summary: ClassVar[str] = "progressive: LoRA takes over the function of redundant units while LHSPG zeroes them"
    needs: ClassVar[MethodNeeds] = "training"
    changes_weights: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = LoRAShearSettings
    settings: LoRAShearSettings

    @property
    def training_steps(self) -> int:
        """See ``Method.training_steps``."""
        return self.settings.steps

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: each period has new scores."""
        return TextRead.by(self._saliency.criteria.values(), self.settings.periods)

    def run(self, task: PruningTask) -> Decision:
        """Algorithm 4. Changes the weights of ``task.model`` in place, not their shapes. The removed units are zero."""
        consumed = still_consumed(task.model, task.restricted)
        return Periods(task, self.settings, self._saliency, partial(self._transfer, consumed)).run()

    def _transfer(self, consumed: Collection[str], graph: DependencyGraph, period: Period) -> Transfer:
        settings = self.settings
        if settings.projection == "decay":
            return Decay(graph, period.redundant, period.gone, steps=period.steps, consumed=consumed)
        return HalfSpace(
            graph, period.redundant, period.gone, steps=period.steps, consumed=consumed, epsilon=settings.epsilon
        )

    @property
    def _saliency(self) -> Saliency:
        return Saliency(self.settings.saliency)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``. Zeroing must equal removing, norms must be adjustable, and a saliency that reads
        adapters must find them in every group; tested on a twin."""
        super().check(task)
        require_maskable(task.prunable)
        consumed = still_consumed(task.model, task.restricted)
        adapted = attach_lora(cast(PreTrainedModel, twin_of(task.model, weights=True)), task.lora, task.seed)
        graph = adapted_graph(adapted, task)
        check_norms(adapted, graph, consumed)
        self._saliency.check(adapted, graph)

"""Which units are redundant: several criteria, weighted and added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel

from secateur.importance import CRITERIA
from secateur.importance.base import Checked
from secateur.methods.base import PruningTask, adapted_graph, score
from secateur.precision import autocast
from secateur.types import DependencyGraph, Scores


@dataclass(frozen=True)
class Saliency:
    """Criteria of ``CRITERIA`` with their weights."""

    weights: Mapping[str, float]

    @property
    def readers(self) -> list[str]:
        """The criteria that read trained adapters."""
        return [name for name in self.weights if CRITERIA[name].needs == "adapters"]

    def check(self, adapted: PeftModel, graph: DependencyGraph) -> None:
        """Raise the ModelError that scoring would end with; ``graph`` is that of the model with fresh adapters."""
        for criterion in map(CRITERIA.__getitem__, self.weights):
            if isinstance(criterion, Checked):
                criterion.check(adapted, graph)

    def of_adapters(self, task: PruningTask, adapted: PeftModel, seed: int) -> dict[str, Scores]:
        """The scores of the criteria that read adapters, while these are still on the task's model."""
        if not self.readers:
            return {}
        graph = adapted_graph(adapted, task)
        with autocast(task.training.precision, task.model.device):
            return {name: CRITERIA[name].score(adapted, graph, task.calibration, seed) for name in self.readers}

    def scores(self, task: PruningTask, found: Mapping[str, Scores], seed: int) -> Scores:
        """All criteria together: those in ``found``, and the others as the task's model is now."""
        every = {name: found[name] if name in found else score(task, CRITERIA[name], seed) for name in self.weights}
        return combine(every, self.weights)


def combine(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """``Σ weight · score / ‖score‖`` over criteria, with norms over the units of all groups.

    Each is divided by its norm so that none drowns the others (HESSO).
    """
    total: dict[str, torch.Tensor] = {}
    for name, scores in found.items():
        norm = torch.stack([scores[group].double().square().sum() for group in scores]).sum().sqrt()
        scale = weights[name] / float(norm) if norm > 0 else weights[name]
        for group in scores:
            total[group] = total.get(group, torch.zeros(())) + scale * scores[group]
    return Scores(total, all(scores.of_loss for scores in found.values()))

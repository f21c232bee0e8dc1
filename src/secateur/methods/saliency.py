"""Ranks redundant units by the weighted sum of several criteria."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from peft import PeftModel
from pydantic import AfterValidator, Field, ValidationError
from torch import nn

from secateur.errors import InputError
from secateur.importance import Criterion, criterion_class
from secateur.keeping import keep, take
from secateur.methods.base import PruningTask, TextRead, adapted_graph
from secateur.reading import brief
from secateur.types import DependencyGraph, Scores

Weights = Mapping[str, float | Mapping[str, Any]]
"""Criterion → its weight, or a mapping of ``weight`` (1 if left out) and the criterion's own options."""


class Saliency:
    """Criteria with their weights, ``Saliency({"fisher": 1.0, "lora": {"weight": 0.5, "sides": "both"}})``.

    Raises InputError for an unknown criterion, and ValueError for options that it does not have or weights that are not
    positive and finite.
    """

    def __init__(self, weights: Weights) -> None:
        self.criteria: dict[str, Criterion] = {}
        self.weights: dict[str, float] = {}
        for name, given in weights.items():
            options = dict(given) if isinstance(given, Mapping) else {"weight": given}
            weight = options.pop("weight", 1.0)
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight <= sys.float_info.max:
                raise ValueError(f"the weight of {name} must be a positive, finite number; got {brief(weight)}")
            self.weights[name] = float(weight)
            self.criteria[name] = criterion_class(name).model_validate(options)
        if not self.weights or not math.isfinite(sum(self.weights.values())):
            raise ValueError(f"give at least one weight; weights and their sum must be finite; got {dict(weights)}")

    @property
    def readers(self) -> list[str]:
        """The criteria that read trained adapters."""
        return [name for name, criterion in self.criteria.items() if criterion.needs == "adapters"]

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: one score by all criteria."""
        return TextRead.by(self.criteria.values())

    def check_plain(self, task: PruningTask, method: str) -> None:
        """Raise the error that scoring would raise, for a method that trains no adapters: InputError when a criterion
        reads them."""
        if self.readers:
            raise InputError(
                f"{method} trains no adapters, and {', '.join(self.readers)} read them: name other criteria."
            )
        self.check(task.model, task.restricted)

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """Raise the ModelError that scoring would raise; with adapters, ``graph`` is that of the model with fresh
        ones."""
        for criterion in self.criteria.values():
            criterion.check(model, graph)

    def of_adapters(self, task: PruningTask, adapted: PeftModel, seed: int) -> dict[str, Scores]:
        """Scores of the criteria that read adapters, while these are still on the task's model."""
        if not self.readers:
            return {}
        graph = adapted_graph(adapted, task)
        return {name: self.criteria[name].score(adapted, graph, task.calibration, seed) for name in self.readers}

    def scores(self, task: PruningTask, found: Mapping[str, Scores], seed: int) -> Scores:
        """Combined scores: those in ``found``, and the other criteria on the task's model as it is now."""
        every = {
            name: found[name] if name in found else task.score(criterion, seed)
            for name, criterion in self.criteria.items()
        }
        return combine(every, self.weights)

    def first_scores(self, task: PruningTask) -> Scores:
        """Scores of the task's model before anything is removed; those of an interrupted run, if it has kept them."""
        path = None if task.work is None else task.work / "start.safetensors"
        found = take(path, Scores.load)
        if found is None:
            found = self.scores(task, {}, task.seed)
            keep(path, found.save)
        return found


def _checked(weights: Weights) -> dict[str, Any]:
    """``weights`` as they are; a ValueError that names the fault when ``Saliency`` does not take them."""
    try:
        Saliency(weights)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise ValueError(f"the criterion's option {key}: {fault['msg']}") from error
    except InputError as error:
        raise ValueError(str(error)) from error
    return dict(weights)


SaliencyWeights = Annotated[dict[str, float | dict[str, Any]], Field(min_length=1), AfterValidator(_checked)]
"""``Weights`` as a field of a method's settings."""


def combine(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """``Σ weight · score / ‖score‖`` over criteria, with norms over the units of all groups.

    Each is divided by its norm, or one criterion would dominate the others (HESSO).
    """
    total: dict[str, torch.Tensor] = {}
    for name, scores in found.items():
        norm = torch.stack([scores[group].double().square().sum() for group in scores]).sum().sqrt()
        scale = weights[name] / float(norm) if norm > 0 else weights[name]
        for group in scores:
            total[group] = total.get(group, torch.zeros(())) + scale * scores[group]
    return Scores(total, all(scores.of_loss for scores in found.values()))

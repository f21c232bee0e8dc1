"""First-order Taylor: the change of the loss if a unit's weights were zero (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from secateur.importance.base import Criterion, Needs, require_gradients
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.units import base_members, base_parameters, effective_weight, sum_units
from secateur.walk import Calibration, borrowed, calibration_for

Form = Literal["element", "vector"]


def first_order(weight: torch.Tensor, gradient: torch.Tensor, form: Form) -> torch.Tensor:
    """Contribution of each element: ``|w · g|`` (``element``) or ``w · g`` (``vector``: its sum loses the sign)."""
    product = weight.float() * gradient.float()
    return product.abs() if form == "element" else product


class Taylor(Criterion):
    """``Σ |w · ∂L/∂w|`` over all members and elements of a unit: LLM-Pruner's Element¹, its default.

    ``vector`` is its vector-wise form ``|Σ w · ∂L/∂w|``: the first-order change of the loss when exactly this unit is
    removed. L is the mean next-token loss over all blocks: gradients of the blocks are averaged before absolute values
    are taken. Memory beside the model: one gradient for each weight of a prunable group, in the weight's own type. The
    other weights get none. With LoRA the weight is ``W + s B A``, and its gradient is of this sum.
    """

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"
    summary: ClassVar[str] = "weights times gradients of the loss (LLM-Pruner, first order)"
    needs: ClassVar[Needs] = "gradients"

    form: Form = "element"
    """``element``: sum of absolute values (Element¹); ``vector``: absolute value of the sum."""

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration_for(calibration, self.name)
        if not graph.prunable:
            return Scores({})
        parameters = dict(model.named_parameters())
        wanted = {member.parameter for group in graph.prunable for member in base_members(group, parameters)}
        wanted |= {name for group in graph.prunable for unit in base_parameters(graph, group) for name in unit}
        require_gradients(graph, parameters, wanted, self.name)
        with borrowed(model, wanted) as trained:
            text.backward(model)
            values = {
                group.name: self._unit_scores(model, group, trained)
                if group.members
                else self._module_scores(model, base_parameters(graph, group), trained)
                for group in graph.prunable
            }
            return Scores(values, of_loss=True)

    def _module_scores(
        self, model: nn.Module, units: list[list[str]], trained: dict[str, nn.Parameter]
    ) -> torch.Tensor:
        """As ``_unit_scores``, over all parameters of each unit."""
        scores = torch.zeros(len(units))
        for unit, names in enumerate(units):
            for name in names:
                gradient = trained[name].grad
                if gradient is not None:
                    scores[unit] += float(first_order(effective_weight(model, name), gradient, self.form).sum())
        return scores.abs()

    def _unit_scores(self, model: nn.Module, group: NodeGroup, trained: dict[str, nn.Parameter]) -> torch.Tensor:
        total = torch.zeros(group.size)
        for member in base_members(group, trained):
            gradient = trained[member.parameter].grad
            if gradient is None:  # no token reached it (an expert that was never chosen)
                continue
            weight = effective_weight(model, member.parameter)
            total += sum_units(first_order(weight, gradient, self.form), member, group.size).cpu()
        return total.abs()

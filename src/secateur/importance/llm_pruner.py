"""The four criteria of LLM-Pruner (arXiv 2305.11627, section 3.2), and its aggregation over dependent weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from secateur.importance.base import Criterion, Needs, require_gradients, unscorable
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, other_axes, sum_rows
from secateur.walk import Calibration, borrowed, calibration_for

Form = Literal["vector", "first", "second", "mixed"]
Aggregate = Literal["sum", "product", "max", "last"]


def salience(weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor | None, form: Form) -> torch.Tensor:
    """The contribution of each element before summation; fp32, of the weight's shape.

    ``vector``: w g, with its sign until a row is summed; ``first`` (Element¹): |w g|; ``second`` (Element²): w² q;
    ``mixed``: |w g − ½ w² q|.

    Args:
        gradient: g, of the mean loss over all samples.
        squares: q, the mean over samples of their squared gradients (the diagonal of the Fisher matrix, which
            approximates the Hessian); None where the form does not need it.
    """
    w = weight.float()
    if form == "vector":
        return w * gradient.float()
    if form == "first":
        return (w * gradient.float()).abs()
    assert squares is not None
    curvature = w.square() * squares.float()
    return curvature if form == "second" else (w * gradient.float() - 0.5 * curvature).abs()


def aggregate(scores: Sequence[torch.Tensor], consumers: Sequence[torch.Tensor], how: Aggregate) -> torch.Tensor:
    """One score per unit from those of its members, each ``[units]``. ``last`` uses the consuming members only."""
    stacked = torch.stack(list(consumers if how == "last" else scores))
    if how == "product":
        return stacked.prod(0)
    return stacked.max(0).values if how == "max" else stacked.sum(0)


class Salience(Criterion):
    """Gradients times weights in four forms; a score for each row (or column), summed over the rows of a unit.

    L is the mean next-token loss. ``second`` and ``mixed`` run one block at a time, because every sample needs its own
    gradient. Memory: one gradient for each weight of a prunable group, and for these two forms two more copies of them
    (the sum of gradients, and of their squares).
    """

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"
    summary: ClassVar[str] = "weights times gradients, first and second order, by vector or by element"
    needs: ClassVar[Needs] = "gradients"

    form: Form = "first"
    """``vector``; ``first``: Element¹, the default of the code; ``second``: Element², squared gradients of single
    samples for the Hessian; ``mixed``: both orders."""
    members: Aggregate = "sum"
    """How the scores of a unit's matrices are combined: ``sum``, ``product``, ``max``, or ``last``: the consuming ones
    only."""

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration_for(calibration, self.name)
        if not graph.prunable:
            return Scores({})
        parameters = dict(model.named_parameters())
        wanted = {member.parameter for group in graph.prunable for member in base_members(group, parameters)}
        require_gradients(graph, parameters, wanted, self.name)
        with borrowed(model, wanted) as trained:
            squares: dict[str, torch.Tensor] = {}
            if self.form in ("second", "mixed"):
                squares = _gradients_and_squares(model, text, trained)
            else:
                text.backward(model)
            found = {group.name: self._unit_scores(model, group, trained, squares) for group in graph.prunable}
            return Scores(found, of_loss=self.members == "sum")

    def _unit_scores(
        self, model: nn.Module, group: NodeGroup, trained: dict[str, nn.Parameter], squares: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        scores, consumers = [], []
        for member in _matrices(group, trained):
            gradient = trained[member.parameter].grad
            if gradient is None:  # no token reached it (an expert that was never chosen)
                continue
            weight = effective_weight(model, member.parameter)
            rows = self._rows(salience(weight, gradient, squares.get(member.parameter), self.form), member)
            scores.append(sum_rows(rows, member, group.size).cpu())
            if member.role == "in":
                consumers.append(scores[-1])
        if not scores or (self.members == "last" and not consumers):
            raise unscorable(group, self.name, "none of its weights has a gradient")
        return aggregate(scores, consumers, self.members)

    def _rows(self, elements: torch.Tensor, member: Member) -> torch.Tensor:
        """``[rows]``: absolute values are taken of elements, or, in the vector form, of sums over rows."""
        axes = other_axes(elements, member.axis)
        rows = elements.sum(dim=axes) if axes else elements
        return rows.abs()


def _matrices(group: NodeGroup, trained: dict[str, nn.Parameter]) -> list[Member]:
    """The members to score. As in the authors' code, biases and norms are left out (the gradient of a key's bias is
    zero, and every product would be zero), except where there is nothing else."""
    members = list(base_members(group, trained))
    return [member for member in members if trained[member.parameter].dim() > 1] or members


def _gradients_and_squares(
    model: nn.Module, text: Calibration, trained: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Leave the gradient of the mean loss in ``.grad``, and return the mean of the blocks' squared gradients."""
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    for _ in text.window_gradients(model, trained.values()):
        for name, parameter in trained.items():
            gradient = parameter.grad
            if gradient is not None:
                part = gradient.float() / len(text)
                squares[name] = squares.get(name, torch.zeros_like(part)).addcmul_(gradient.float(), part)
                sums[name] = sums.get(name, torch.zeros_like(part)).add_(part)
    for name, total in sums.items():
        trained[name].grad = total.to(trained[name].dtype)
    return squares

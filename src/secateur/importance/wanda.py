"""Wanda-sp: weights times the size of their inputs (arXiv 2306.11695; structured form from FLAP's code)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from secateur.importance.base import Criterion, Needs, unscorable
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, stored_weight, sum_rows
from secateur.walk import Calibration, Moments, borrowed, calibration_for, watched


def wanda_columns(weight: torch.Tensor, axis: int, mean_square: torch.Tensor) -> torch.Tensor:
    """Mean over the outputs i of ``|W_ij| · sqrt(mean x_j²)``, a number for each input channel j.

    Args:
        weight: the consuming matrix, two axes.
        axis: its input axis (1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``).
        mean_square: ``[inputs]``, the mean of x_j² over all tokens.

    Returns:
        fp32, shape ``[inputs]``.
    """
    return weight.float().abs().mean(dim=1 - axis) * mean_square.sqrt()


class WandaSP(Criterion):
    """Wanda-sp on the matrices that consume a unit (role ``in``): a score for each input channel, summed over a unit.

    All groups are scored on the activations of the dense model. Works on every module that multiplies its input with
    a two-axis ``weight`` (``nn.Linear``, GPT-2's ``Conv1D``, both inside LoRA, where ``W + s B A`` counts) and on
    stacked experts ``[experts, …, …]``, where the scores of the experts are averaged by the tokens routed to each.
    """

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    summary: ClassVar[str] = "weights times the size of their input activations (Wanda-sp)"
    needs: ClassVar[Needs] = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration_for(calibration, self.name)
        moments, reader = self.moments(model, graph), text.reader(model)
        with borrowed(model), watched(model, moments):
            text.run(reader, "activations")
        return self.from_moments(model, graph, moments)

    def moments(self, model: nn.Module, graph: DependencyGraph) -> dict[str, Moments]:
        """The statistics to collect for scoring ``graph``: parameter → the moments of its inputs, still empty."""
        members = [member for group in graph.prunable for member in self._consumers(model, group)]
        return {member.parameter: Moments.of(model, member) for member in members}

    def from_moments(self, model: nn.Module, graph: DependencyGraph, moments: Mapping[str, Moments]) -> Scores:
        """Scores from moments that have been collected."""
        found = {}
        for group in graph.prunable:
            total = torch.zeros(group.size)
            for member in self._consumers(model, group):
                columns = _columns(effective_weight(model, member.parameter), member.axis, moments[member.parameter])
                total += sum_rows(columns, member, group.size).cpu()
            found[group.name] = total
        return Scores(found)

    def _consumers(self, model: nn.Module, group: NodeGroup) -> list[Member]:
        members = [member for member in base_members(group) if member.role == "in"]
        if not members:
            raise unscorable(group, self.name, "no weight consumes its units")
        for member in members:
            weight = stored_weight(model, member.parameter)
            if not (_is_linear(member, weight) or _is_stacked(member, weight)):
                reason = f"{member.parameter} {list(weight.shape)} is neither a linear's weight nor stacked experts"
                raise unscorable(group, self.name, reason)
        return members


def _is_linear(member: Member, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and member.parameter.endswith(".weight")


def _is_stacked(member: Member, weight: torch.Tensor) -> bool:
    return weight.dim() == 3 and member.axis > 0


def _columns(weight: torch.Tensor, axis: int, moments: Moments) -> torch.Tensor:
    """Wanda's score of each input channel, ``[inputs]``; each expert counts as often as it was chosen."""
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    share = (moments.tokens / moments.tokens.sum().clamp_min(1)).to(weight.device, torch.float32)
    mean_square = moments.mean_square.to(weight.device)
    scores = [
        wanda_columns(matrix, axis - weight.dim() + 2, mean_square[expert]) * share[expert]
        for expert, matrix in enumerate(matrices)
    ]
    return torch.stack(scores).sum(0)

"""FLAP (arXiv 2312.11983): the fluctuation of a channel around its mean, and a bias that replaces the mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn

from secateur.importance.base import Criterion, Needs, unscorable
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, sum_rows
from secateur.walk import Calibration, Moments, borrowed, calibration_for, watched


def fluctuation(weight: torch.Tensor, axis: int, variance: torch.Tensor) -> torch.Tensor:
    """WIFV: ``Var(X_j) · Σ_i W_ij²`` of each input channel j, ``[channels]`` (equation 5).

    Args:
        weight: the consuming matrix, two axes.
        axis: its input axis.
        variance: ``[channels]``.
    """
    return variance * weight.float().square().sum(dim=1 - axis)


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """z-scores over the channels of one module, ``[channels]``, which make modules comparable (equation 6)."""
    spread = scores.std() if len(scores) > 1 else torch.zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


class Fluctuation(Criterion):
    """FLAP's criterion: z-scored fluctuation of the inputs of ``o_proj`` and ``down_proj``, averaged over a unit.

    All groups are measured on the dense model, as in FLAP. Scores of different groups are comparable without scaling.
    """

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"
    summary: ClassVar[str] = "fluctuation of a channel around its mean, which a bias replaces"
    needs: ClassVar[Needs] = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        return self.from_moments(model, graph, self.measure(model, graph, calibration))

    def measure(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None) -> dict[str, Moments]:
        """Moments of the inputs of every matrix that consumes a prunable group, by parameter."""
        text = calibration_for(calibration, self.name)
        members = [member for group in graph.prunable for member in consumers(model, group, self.name)]
        moments = {member.parameter: Moments.of(model, member) for member in members}
        reader = text.reader(model)
        with borrowed(model), watched(model, moments):
            text.run(reader, "activations")
        return moments

    def from_moments(self, model: nn.Module, graph: DependencyGraph, moments: Mapping[str, Moments]) -> Scores:
        """Scores from the moments of ``measure``."""
        found = {}
        for group in graph.prunable:
            total = torch.zeros(group.size)
            for member in consumers(model, group, self.name):
                weight = effective_weight(model, member.parameter)
                variance = moments[member.parameter].variance[0].to(weight.device)
                channels = standardise(fluctuation(weight, member.axis, variance))
                total += sum_rows(channels, member, group.size).cpu() / member.rows_per_unit
            found[group.name] = total
        return Scores(found, on_one_scale=True)

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """See ``Criterion.check``: only linears consume the groups."""
        for group in graph.prunable:
            consumers(model, group, self.name)


def compensation(
    model: nn.Module, graph: DependencyGraph, moments: Mapping[str, Moments], removed: Mapping[str, Iterable[int]]
) -> dict[str, torch.Tensor]:
    """Biases that compensate for removed channels (section 3.4): path of the bias → its new values, ``[outputs]``.

    The mean contribution of the removed channels, ``W (mean ⊙ removed)``, is added to the bias of the linear that
    consumes them. A linear without a bias starts from zero.
    """
    biases: dict[str, torch.Tensor] = {}
    for name, units in removed.items():
        for member in consumers(model, graph[name], "flap"):
            weight = effective_weight(model, member.parameter).float()
            rows = member.rows(sorted(units)).flatten().to(weight.device)
            mean = moments[member.parameter].mean[0].to(weight.device)[rows]
            lost = weight.index_select(member.axis, rows).movedim(member.axis, 1) @ mean
            path = f"{member.parameter.rpartition('.')[0]}.bias"
            biases[path] = biases[path] + lost.cpu() if path in biases else lost.cpu()
    there = dict(model.named_parameters())
    for path in biases.keys() & there.keys():
        old = there[path].detach()
        biases[path] = (old + biases[path].to(old.device, old.dtype)).cpu()
    return biases


def consumers(model: nn.Module, group: NodeGroup, criterion: str) -> list[Member]:
    """The linears that consume a group. Raises ModelError when anything else consumes it."""
    members = [member for member in base_members(group) if member.role == "in"]
    for member in members:
        weight = model.get_parameter(member.parameter)
        if weight.dim() != 2 or not member.parameter.endswith(".weight"):
            raise unscorable(group, criterion, f"{member.parameter} is not the weight of a linear")
    if not members:
        raise unscorable(group, criterion, "no weight consumes its units")
    return members

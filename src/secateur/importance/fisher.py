"""Fisher information of a switch on each unit: the squared effect of the unit on the loss of single texts.

Molchanov et al. 2019 (arXiv 1906.10771, equation 8, its squared first-order term averaged over samples); for masks of
heads and channels of transformers Kwon et al. 2022 (arXiv 2204.09656, equation 8).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from secateur.importance.base import Criterion, Needs, require_gradients, unscorable
from secateur.importance.taylor import first_order
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, sum_units
from secateur.walk import Calibration, borrowed, calibration_for


class Fisher(Criterion):
    """``mean over blocks of (∂L_block/∂m)²``, where the switch m = 1 multiplies the output of the unit.

    That derivative is ``Σ w · ∂L/∂w`` over the weights that consume the unit (role ``in``). It is exact, and needs no
    switch in the model. Signs cancel within a block, but not between blocks: a unit that helps one text and hurts
    another counts, and a mean of gradients (``taylor``) would miss it. Memory: the gradients of the consuming weights
    only. Each pass runs one block, because every block needs its own gradient.
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "https://arxiv.org/abs/1906.10771"
    summary: ClassVar[str] = "squared derivative of each text's loss by a switch on the unit"
    needs: ClassVar[Needs] = "gradients"

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration_for(calibration, self.name)
        if not graph.prunable:
            return Scores({})
        parameters = dict(model.named_parameters())
        consumers = {group.name: self._consumers(group, parameters) for group in graph.prunable}
        wanted = {member.parameter for members in consumers.values() for member in members}
        require_gradients(graph, parameters, wanted, self.name)
        total = {group.name: torch.zeros(group.size) for group in graph.prunable}
        with borrowed(model, wanted) as trained:
            for _ in text.window_gradients(model, trained.values()):
                for name, members in consumers.items():
                    total[name] += _switch_gradient(model, trained, members, graph[name].size).square()
        return Scores({name: scores / len(text) for name, scores in total.items()}, of_loss=True)

    def _consumers(self, group: NodeGroup, parameters: dict[str, nn.Parameter]) -> list[Member]:
        members = [member for member in base_members(group, parameters) if member.role == "in"]
        if not members:
            raise unscorable(group, self.name, "no weight consumes its units")
        return members


def _switch_gradient(
    model: nn.Module, trained: dict[str, nn.Parameter], members: list[Member], size: int
) -> torch.Tensor:
    """``[size]``, fp32: the derivative of the loss by each unit's switch."""
    total = torch.zeros(size)
    for member in members:
        gradient = trained[member.parameter].grad
        if gradient is not None:  # None: no token reached it (an expert that was never chosen)
            weight = effective_weight(model, member.parameter)
            total += sum_units(first_order(weight, gradient, "vector"), member, size).cpu()
    return total

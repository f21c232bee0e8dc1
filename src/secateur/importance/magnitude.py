"""Magnitude: a unit with small weights is assumed to be unimportant."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from secateur.importance.base import Criterion
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.units import base_members, base_parameters, effective_weight, other_axes, sum_rows, sum_units
from secateur.walk import Calibration


def column_norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """L2 norm of each slice of ``weight`` along ``axis``: shape ``[weight.shape[axis]]``, fp32."""
    return weight.float().square().sum(dim=other_axes(weight, axis)).sqrt()


class Magnitude(Criterion):
    """L2 norm of the weights of a unit; no text.

    ``consumers`` is magnitude-sp as FLAP (arXiv 2312.11983) compares with it: the norm of each column of the consuming
    matrices (``o_proj``, ``down_proj``: role ``in``), summed over the columns of a unit. ``all`` is the norm of the
    unit as a whole, over every member: LLM-Pruner's (arXiv 2305.11627) "L2" baseline. It is also used for units that no
    matrix consumes: experts, tokens, whole layers.
    """

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"
    summary: ClassVar[str] = "L2 norm of the weights that consume a unit; needs no text"

    over: Literal["consumers", "all"] = "consumers"
    """``consumers``: columns of the matrices that consume the unit (magnitude-sp of the FLAP paper); ``all``: every
    weight of the unit (the "L2" of the LLM-Pruner paper)."""

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        return Scores({group.name: self._score(model, graph, group).cpu() for group in graph.prunable})

    def _score(self, model: nn.Module, graph: DependencyGraph, group: NodeGroup) -> torch.Tensor:
        if group.modules:
            return self._modules(model, base_parameters(graph, group))
        consumed = any(member.role == "in" for member in base_members(group))
        return self._consumers(model, group) if consumed and self.over == "consumers" else self._all(model, group)

    def _modules(self, model: nn.Module, units: list[list[str]]) -> torch.Tensor:
        squares = [
            sum(float(effective_weight(model, name).float().square().sum()) for name in parameters)
            for parameters in units
        ]
        return torch.tensor(squares).sqrt()

    def _consumers(self, model: nn.Module, group: NodeGroup) -> torch.Tensor:
        scores = [
            sum_rows(column_norms(effective_weight(model, member.parameter), member.axis), member, group.size)
            for member in base_members(group)
            if member.role == "in"
        ]
        return torch.stack([score.cpu() for score in scores]).sum(0)

    def _all(self, model: nn.Module, group: NodeGroup) -> torch.Tensor:
        squares = [
            sum_units(effective_weight(model, member.parameter).float().square(), member, group.size).cpu()
            for member in base_members(group)
        ]
        return torch.stack(squares).sum(0).sqrt()

"""The remaining units of each group in the order of removal, and exact counts of parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from secateur.types import Cut, DependencyGraph, NodeGroup, Scores

Normalise = Literal["auto", "mean", "parameters", "none"]


@dataclass(frozen=True)
class Stack:
    """The remaining units of one group, in the order of removal."""

    group: NodeGroup
    order: torch.Tensor
    """``[left]``, unit indices by ascending score, ties by index; with several runs the lowest of each run first, then
    the second lowest of each. Units that must be kept are last."""
    scores: torch.Tensor
    """``[left]``, float64, in that order, comparable between groups."""
    parameters: int
    """Parameters removed with one unit while everything else is whole."""

    @cached_property
    def left(self) -> int:
        return len(self.order)

    def chunk_scores(self, stops: torch.Tensor) -> torch.Tensor:
        """``[len(stops) − 1]``: the mean score of the units removed between one stop and the next, ascending.

        ``stops`` are numbers of kept units, descending from ``left``.
        """
        total = torch.cat([torch.zeros(1, dtype=torch.float64), self.scores.cumsum(0)])
        gone = self.left - stops
        means = total[gone].diff() / gone.diff()
        return means.cummax(0).values if len(means) else means

    def loss(self, kept: int) -> float:
        """Sum of the scores of the removed units when ``kept`` units are kept."""
        return float(self.scores[: self.left - kept].sum())

    def lowest(self, kept: int) -> list[int]:
        """The units to remove when ``kept`` units are kept."""
        return self.order[: self.left - kept].tolist()

    def highest(self, kept: int) -> list[int]:
        """The units to keep when ``kept`` units are kept."""
        return self.order[self.left - kept :].tolist()


def comparable(scores: torch.Tensor, parameters: int, normalise: Normalise) -> torch.Tensor:
    """Scores of the units of one group on a scale that is shared between groups, float64.

    Args:
        scores: ``[units]``, of the remaining units.
        parameters: number of parameters removed with one unit.
        normalise: see ``Budget.normalise``; not ``auto`` (``scale_of``).
    """
    scores = scores.double()
    if normalise == "parameters":
        return scores / max(parameters, 1)
    mean = scores.abs().mean() if normalise == "mean" and len(scores) else torch.zeros(())
    return scores / mean if mean > 0 else scores


def scale_of(scores: Scores, normalise: Normalise) -> Normalise:
    """``normalise``, with ``auto`` replaced by its meaning for these scores; ``none`` for an order of removal."""
    if scores.reach is not None:
        return "none"
    if normalise != "auto":
        return normalise
    return "none" if scores.on_one_scale else "parameters" if scores.of_loss else "mean"


def build_stack(
    graph: DependencyGraph, group: NodeGroup, scores: Scores, removed: Iterable[int], normalise: Normalise
) -> Stack:
    """The stack of ``group`` without the units in ``removed``."""
    gone = torch.zeros(group.size, dtype=torch.bool)
    gone[torch.tensor(list(removed), dtype=torch.long)] = True
    left = (~gone).nonzero().flatten()
    cost = graph.unit_cost(group)
    values = comparable(scores[group.name][left], cost, scale_of(scores, normalise))
    index = values.argsort(stable=True)
    if group.fixed:
        stays = torch.isin(left[index], torch.tensor([unit for unit, _ in group.fixed]))
        index = torch.cat([index[~stays], index[stays]])
    if group.runs > 1:
        place = torch.empty(group.size, dtype=torch.long)
        place[left] = torch.arange(len(left))
        index = place[group.in_turn(left[index].tolist())]
    return Stack(group, left[index], values[index], cost)


class Count:
    """Exact numbers of parameters of the model for given numbers of kept units (groups may share a parameter).

    Where one axis of a parameter is cut, each unit removes the same number from it, whatever other groups keep. These
    are counted once. The rest is counted by shapes (``DependencyGraph.numel``).
    """

    def __init__(self, graph: DependencyGraph, gone: Mapping[str, Collection[int]], stacks: Sequence[Stack]) -> None:
        """``gone``: the units that groups have already lost; ``stacks``: the groups that may lose more. The units
        themselves matter where units are modules of different sizes."""
        self.graph = graph
        self._modules = {stack.group.name: stack for stack in stacks if stack.group.modules}
        modules = {name: units for name, units in gone.items() if graph[name].modules}
        self._stays = Cut.removing(graph, modules)
        self._fixed = {name: graph[name].size - len(units) for name, units in gone.items()}
        self._cut = {stack.group.name for stack in stacks} | gone.keys()
        self.total = graph.parameter_count()
        self._each = dict.fromkeys(self._cut, 0)
        """Group → parameters that go with each unit of it, those of ``_joint`` apart."""
        self._joint: dict[str, int] = {}
        """A parameter of which a unit removes more or less, depending on other groups → the number of equal ones."""
        for name, many in graph.alike.items():
            if self._is_joint(name):
                self._joint[name] = many
            for group, member in () if name in self._joint else graph.of_parameter(name):
                if group.name in self._cut:
                    self._each[group.name] += many * member.elements_per_unit(graph.shapes[name])
        self._others = self.total - self._joint_count(self._joint, {})

    def __call__(self, kept: Mapping[str, int]) -> int:
        """Parameters when each named group, which has a stack, keeps ``kept`` units, and the others do not change."""
        counts = {**self._fixed, **kept}
        gone = sum(self._each[name] * (self.graph[name].size - count) for name, count in counts.items())
        return self._others - gone + self._joint_count(self._joint, counts)

    def step(self, kept: Mapping[str, int], group: NodeGroup, to: int) -> int:
        """Parameters removed when ``group`` is reduced to ``to`` units and the others keep ``kept``."""
        before = {**self._fixed, **kept}
        names = self.graph.parameters_of(group) if self._joint else ()
        joint = dict.fromkeys((name for name in names if self._is_joint(name)), 1)
        fewer = self._joint_count(joint, before) - self._joint_count(joint, {**before, group.name: to})
        return self._each[group.name] * (before.get(group.name, group.size) - to) + fewer

    def _is_joint(self, parameter: str) -> bool:
        """Whether several axes of ``parameter`` are cut, or it is removed as a whole with a unit."""
        axes = {member.axis for group, member in self.graph.of_parameter(parameter) if group.name in self._cut}
        return len(axes) > 1 or self.graph.unit_of.get(parameter, ("", 0))[0] in self._cut

    def _joint_count(self, parameters: Mapping[str, int], kept: Mapping[str, int]) -> int:
        if not parameters:
            return 0
        units = {name: self._units(name, count) for name, count in kept.items()}
        return sum(many * self.graph.numel(name, units) for name, many in parameters.items())

    def _units(self, name: str, kept: int) -> Sequence[int]:
        if name in self._modules:
            return self._modules[name].highest(kept)
        return self._stays.get(name, range(kept))

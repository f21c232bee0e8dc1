"""Level switches (EvoPress, arXiv 2410.14649): steps from an allocation to others with the same number of parameters.

A switch removes a level more units from one place and restores as many parameters in another.
"""

from __future__ import annotations

import copy
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from secateur.planning.problem import Problem
from secateur.planning.shares import share_of
from secateur.planning.stacks import Stack
from secateur.types import Removed

Levels = tuple[int, ...]
"""Number of removed units of each lot."""

_TRIES = 50
"""Random pairs of lots that are tried for one switch."""


@dataclass(frozen=True)
class Lot:
    """Units that are removed in a fixed order. Each group of a lot loses equally many."""

    units: Mapping[str, tuple[int, ...]]
    """Group name → the units that may be removed, in the order of removal."""
    allowed: tuple[int, ...]
    """Numbers of units that each group may lose, ascending."""
    cost: int
    """Parameters removed with one unit of each group."""
    level: int
    """Number of units that a switch moves."""
    share: str | None
    """The pattern of ``budget.shares`` that its groups belong to."""

    @cached_property
    def step(self) -> int:
        """Parameters of the smallest step."""
        gaps = [after - before for before, after in pairwise(self.allowed)]
        return self.cost * min(gaps, default=0)

    def beyond(self, removed: int, way: int) -> Sequence[int]:
        """The allowed numbers above ``removed`` (``way`` 1) or below it (−1)."""
        place = bisect_left(self.allowed, removed)
        return self.allowed[place + 1 :] if way > 0 else self.allowed[:place]

    def moved(self, removed: int, way: int) -> int | None:
        """The allowed number a level further; the nearest to that, but never ``removed``. None when there is none."""
        wanted = removed + way * self.level
        return min(self.beyond(removed, way), key=lambda number: abs(number - wanted), default=None)


class Switches:
    """The allocations that can be reached from the first of some by switches.

    Counts are legal, and not below the floor, unless a start is. The number of parameters differs from the target by no
    more than that of the first start, or by one smallest step. Groups that need equal widths are one lot, each unit of
    a group of whole layers is a lot of its own, and a switch stays within one of ``budget.shares``.
    """

    def __init__(self, problem: Problem, starts: Sequence[Removed], level: float) -> None:
        """
        Args:
            problem: of the whole model, without removed units.
            starts: allocations that solve it, with its scores; the first is the best solution.
            level: share of a group's units that a switch moves, at least one unit.
        """
        self.problem = problem
        self.lots = tuple(_lots(problem, starts, level))
        target = problem.target()
        first = self.levels(starts[0])
        smallest = min((lot.step for lot in self.lots if lot.step), default=0)
        self._target = target
        self._allowed_miss = max(abs(self.parameters(first) - target), smallest)
        found = [levels for levels in map(self.levels, starts) if self._fits(levels)]
        self.starts = tuple(dict.fromkeys(found))
        """The starts as levels, without those that miss the target by more."""

    @property
    def deepest(self) -> dict[str, int]:
        """Group name → the largest number of units that it may lose."""
        return {name: lot.allowed[-1] for lot in self.lots for name in lot.units}

    def ordered(self, orders: Mapping[str, Sequence[int]]) -> Switches:
        """The same allocations with other units: each group loses them in its order, which has ``deepest`` units."""
        found = copy.copy(self)
        found.lots = tuple(
            replace(lot, units={name: tuple(orders.get(name, units)) for name, units in lot.units.items()})
            for lot in self.lots
        )
        return found

    def levels(self, removed: Removed) -> Levels:
        """The levels of an allocation that removes units in the order of the problem's scores."""
        numbers = []
        for lot in self.lots:
            name, units = next(iter(lot.units.items()))
            numbers.append(len(set(units) & set(removed.get(name, ()))))
        return tuple(numbers)

    def removed(self, levels: Levels) -> Removed:
        """Group name → the removed units, ascending; only groups that lose units."""
        gone: Removed = {}
        for lot, number in zip(self.lots, levels, strict=True):
            for name, units in lot.units.items():
                gone[name] = sorted([*gone.get(name, ()), *units[:number]])
        return {name: units for name, units in gone.items() if units}

    def parameters(self, levels: Levels) -> int:
        """Parameters of the model with these levels."""
        graph, kept = self.problem.graph, dict[str, Sequence[int]]()
        for lot, number in zip(self.lots, levels, strict=True):
            for name in lot.units:
                kept[name] = range(graph[name].size - number)
        for name, units in self.removed(levels).items() if self._modules else ():
            if name in self._modules:
                kept[name] = [unit for unit in range(graph[name].size) if unit not in units]
        return graph.parameter_count(kept)

    def child(self, parent: Levels, draw: random.Random, most: int) -> Levels:
        """``parent`` after min(U{1..most}, U{1..most}) switches. A switch that finds no pair of lots is left out."""
        levels = parent
        for _ in range(min(draw.randint(1, most), draw.randint(1, most))):
            levels = self._switched(levels, draw)
        return levels

    def _switched(self, levels: Levels, draw: random.Random) -> Levels:
        for _ in range(_TRIES if len(self.lots) > 1 else 0):
            loses, gains = draw.sample(range(len(self.lots)), 2)
            found = self._exchange(levels, loses, gains)
            if found is not None:
                return found
        return levels

    def _exchange(self, levels: Levels, loses: int, gains: int) -> Levels | None:
        """The lot of dearer units moves a level, the other by as many parameters. None when that is not possible."""
        one, other = self.lots[loses], self.lots[gains]
        if one.share != other.share:
            return None
        coarse, fine, way = (loses, gains, 1) if one.cost >= other.cost else (gains, loses, -1)
        number = self.lots[coarse].moved(levels[coarse], way)
        if number is None:
            return None
        moved = _with(levels, coarse, number)
        around = self._around(moved, fine, self.lots[fine].beyond(levels[fine], -way))
        found = min(around, key=lambda each: abs(self.parameters(each) - self._target), default=None)
        return found if found is not None and self._fits(found) else None

    def _around(self, levels: Levels, lot: int, numbers: Sequence[int]) -> list[Levels]:
        """``levels`` with the two of ``numbers`` for a lot between which the target is; one at an end."""
        place = bisect_left(numbers, -self._target, key=lambda number: -self.parameters(_with(levels, lot, number)))
        return [_with(levels, lot, number) for number in numbers[max(place - 1, 0) : place + 1]]

    def _fits(self, levels: Levels) -> bool:
        """Whether the size is right, and whole layers are as many as they may be."""
        removed = self.removed(levels) if self._modules else {}
        for name in self._modules:
            if self.problem.graph[name].size - len(removed.get(name, ())) not in self.problem.legal[name]:
                return False
        return abs(self.parameters(levels) - self._target) <= self._allowed_miss

    @cached_property
    def _modules(self) -> set[str]:
        """The groups whose units are whole modules."""
        return {name for name, stack in self.problem.stacks.items() if stack.group.modules}


def _lots(problem: Problem, starts: Sequence[Removed], level: float) -> Iterator[Lot]:
    floors = problem.floors(problem.target())
    together: dict[object, list[Stack]] = {}
    for name, stack in problem.stacks.items():
        group = stack.group
        if group.modules:
            yield from _of_modules(problem, stack)
        else:
            together.setdefault((group.kind, group.size) if problem.budget.equal_widths else name, []).append(stack)
    for stacks in together.values():
        numbers = set.intersection(*(_allowed(problem, stack, starts, floors) for stack in stacks))
        group = stacks[0].group
        units = {stack.group.name: tuple(stack.order.tolist()) for stack in stacks}
        cost = sum(stack.parameters for stack in stacks)
        yield Lot(
            units, tuple(sorted(numbers)), cost, max(1, round(level * group.size)), share_of(problem.budget, group)
        )


def _allowed(problem: Problem, stack: Stack, starts: Sequence[Removed], floors: Mapping[str, int]) -> set[int]:
    """Numbers of units that a group may lose: to a legal count, down to its floor or the lowest start."""
    name, size = stack.group.name, stack.group.size
    least = min(floors[name], *(size - len(start.get(name, ())) for start in starts))
    return {size - count for count in problem.legal[name] if count >= least}


def _of_modules(problem: Problem, stack: Stack) -> Iterator[Lot]:
    """One lot for each unit that may be removed: which ones go is searched, in place of how many."""
    group, graph = stack.group, problem.graph
    parameters = graph.parameters_by_unit(group)
    for unit in group.movable:
        cost = sum(graph.numel(name, {}) for name in parameters[unit])
        yield Lot({group.name: (unit,)}, (0, 1), cost, 1, share_of(problem.budget, group))


def _with(levels: Levels, lot: int, number: int) -> Levels:
    return (*levels[:lot], number, *levels[lot + 1 :])

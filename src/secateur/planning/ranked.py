"""Uneven widths: units of all groups compete in one ranking until the target is met."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

import torch

from secateur.planning.problem import Problem
from secateur.planning.stacks import Count, Stack


def ranked_counts(problem: Problem, ratio: float | None = None) -> dict[str, int]:
    """Units that each group keeps when all compete in one ranking; ``ratio`` as in ``allocate``."""
    target = problem.target(ratio)
    floors = problem.floors(target)
    stops = []
    for name, stack in problem.stacks.items():
        legal = problem.legal[name]
        between = legal[bisect_left(legal, floors[name]) : bisect_left(legal, stack.left)]
        stops.append(torch.tensor([stack.left, *reversed(between)]))
    return choose_ranked(problem.count, list(problem.stacks.values()), stops, target)


def choose_ranked(
    count: Count, stacks: Sequence[Stack], stops: Sequence[torch.Tensor], target: float
) -> dict[str, int]:
    """Number of units that each group keeps: the lowest-scored chunks are removed until ``target`` parameters are left.

    A chunk is the units between two stops of a group: one unit, unless widths are rounded. After the last chunk that
    fits, smaller ones further up the ranking fill the remainder (a channel where a head would be too much). One more is
    removed where the result is nearer to the target. If no small chunk is left, a large one is removed and small ones
    are restored. Ties: earlier group, then lower unit index.

    Args:
        count: counts parameters.
        stacks: the units that each group can lose, in order.
        stops: for each stack the numbers of units that it may keep, descending from its present number.
        target: number of parameters to keep.
    """
    ranking = _Ranking(stacks, stops)
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high + 1) // 2
        if count(ranking.kept(ranking.levels(middle))) >= target:
            low = middle
        else:
            high = middle - 1
    return ranking.kept(_settle(count, ranking, ranking.levels(low), target))


class _Ranking:
    """All chunks of all stacks in the order of removal."""

    def __init__(self, stacks: Sequence[Stack], stops: Sequence[torch.Tensor]) -> None:
        self.stacks, self.stops = stacks, stops
        chunks = torch.tensor([len(stop) - 1 for stop in stops], dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(stacks)), chunks)
        scores = torch.cat([stack.chunk_scores(stop) for stack, stop in zip(stacks, stops, strict=True)])
        self.owner = owner[scores.sort(stable=True).indices]
        """``[chunks]``: the stack of the n-th chunk. A stack's chunks are removed in its own order."""
        self.position = self.owner.sort(stable=True).indices
        """Places in the ranking, all of the first stack, then all of the second …"""
        self.first = torch.cat([torch.zeros(1, dtype=torch.long), chunks.cumsum(0)]).tolist()

    def __len__(self) -> int:
        return len(self.owner)

    def levels(self, chunks: int) -> list[int]:
        """Number of chunks of each stack among the first ``chunks``."""
        return torch.bincount(self.owner[:chunks], minlength=len(self.stacks)).tolist()

    def kept(self, levels: Sequence[int]) -> dict[str, int]:
        """Units that each group keeps when ``levels`` of its chunks are removed."""
        triples = zip(self.stacks, self.stops, levels, strict=True)
        return {stack.group.name: int(stops[level]) for stack, stops, level in triples}

    def place(self, stack: int, level: int) -> int | None:
        """Rank of the chunk that follows ``level`` in ``stack``; None when there is none."""
        index = self.first[stack] + level
        return int(self.position[index]) if level >= 0 and index < self.first[stack + 1] else None


class _Settling:
    """Moves from a prefix of the ranking towards the target, chunk by chunk, never past it until the last."""

    def __init__(self, count: Count, ranking: _Ranking, levels: list[int], target: float) -> None:
        self.count, self.ranking, self.levels = count, ranking, list(levels)
        self.kept = ranking.kept(levels)
        self.excess = count(self.kept) - target
        """Parameters still to remove; negative when too many are removed."""

    def cost(self, s: int, way: int) -> int:
        """Parameters in the next chunk of stack ``s`` to remove (``way`` 1) or to restore (−1)."""
        group, stops = self.ranking.stacks[s].group, self.ranking.stops[s]
        upper = self.levels[s] if way > 0 else self.levels[s] - 1
        return self.count.step({**self.kept, group.name: int(stops[upper])}, group, int(stops[upper + 1]))

    def move(self, s: int, way: int) -> None:
        """Remove the next chunk of stack ``s``, or restore its last one."""
        self.excess -= way * self.cost(s, way)
        self.levels[s] += way
        self.kept[self.ranking.stacks[s].group.name] = int(self.ranking.stops[s][self.levels[s]])

    def approach(self, way: int) -> list[int]:
        """Move every chunk that fits, in the order of the ranking (backwards for −1); return the stacks left over."""
        waiting = [(way * place, s) for s in range(len(self.levels)) if (place := self._place(s, way)) is not None]
        heapq.heapify(waiting)
        too_much = []
        while waiting:
            _, s = heapq.heappop(waiting)
            if self.cost(s, way) > way * self.excess:
                too_much.append(s)
                continue
            self.move(s, way)
            place = self._place(s, way)
            if place is not None:
                heapq.heappush(waiting, (way * place, s))
        return too_much

    def step_over(self, stacks: Sequence[int], way: int) -> None:
        """Move one more chunk where that ends nearer to the target; the first of those that end equally near."""
        over, _, s = min(
            ((self.cost(s, way) - way * self.excess, place, s) for place, s in enumerate(stacks)), default=(0, 0, -1)
        )
        if s >= 0 and over < way * self.excess:
            self.move(s, way)

    def _place(self, s: int, way: int) -> int | None:
        return self.ranking.place(s, self.levels[s] if way > 0 else self.levels[s] - 1)


def _settle(count: Count, ranking: _Ranking, levels: list[int], target: float) -> list[int]:
    smallest = min(stack.parameters for stack in ranking.stacks)
    filled = _Settling(count, ranking, levels, target)
    too_much = filled.approach(1)
    swapped = _Settling(count, ranking, filled.levels, target)
    filled.step_over(too_much, 1)
    if too_much and abs(filled.excess) > smallest:
        # no small chunk is left: remove a large one and restore small ones
        swapped.move(too_much[0], 1)
        swapped.step_over(swapped.approach(-1), -1)
        if abs(swapped.excess) < abs(filled.excess):
            return swapped.levels
    return filled.levels

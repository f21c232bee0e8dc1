"""Uneven widths: units of all groups compete in one ranking until the target is met."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from secateur.planning.stacks import Count, Stack


def choose_ranked(
    count: Count, stacks: Sequence[Stack], stops: Sequence[torch.Tensor], target: float
) -> dict[str, int]:
    """How many units each group keeps: the lowest-scored chunks go until ``target`` parameters are left.

    A chunk is what lies between two stops of a group: one unit, unless widths are rounded. After the last chunk that
    fits, cheaper ones further up the ranking fill what is left (a channel where a head would be too much), and one more
    is taken where that ends nearer to the target. Ties: earlier group, then lower unit index.

    Args:
        count: counts parameters.
        stacks: what each group can lose.
        stops: for each stack the numbers of units that it may keep, descending from the number it has now.
        target: parameters to be left.
    """
    ranking = _Ranking(stacks, stops)
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high + 1) // 2
        if count(ranking.kept(ranking.levels(middle))) >= target:
            low = middle
        else:
            high = middle - 1
    return ranking.kept(_fill(count, ranking, ranking.levels(low), target))


class _Ranking:
    """All chunks of all stacks in the order in which they would go."""

    def __init__(self, stacks: Sequence[Stack], stops: Sequence[torch.Tensor]) -> None:
        self.stacks, self.stops = stacks, stops
        chunks = torch.tensor([len(stop) - 1 for stop in stops], dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(stacks)), chunks)
        scores = torch.cat([stack.chunk_scores(stop) for stack, stop in zip(stacks, stops, strict=True)])
        self.owner = owner[scores.sort(stable=True).indices]
        """``[chunks]``: which stack the n-th chunk belongs to; a stack's own chunks go in its own order."""
        self.position = self.owner.sort(stable=True).indices
        """Places in the ranking, all of the first stack, then all of the second …"""
        self.first = torch.cat([torch.zeros(1, dtype=torch.long), chunks.cumsum(0)]).tolist()

    def __len__(self) -> int:
        return len(self.owner)

    def levels(self, chunks: int) -> list[int]:
        """How many chunks of each stack are among the first ``chunks``."""
        return torch.bincount(self.owner[:chunks], minlength=len(self.stacks)).tolist()

    def kept(self, levels: Sequence[int]) -> dict[str, int]:
        """Units that each group keeps when so many of its chunks are gone."""
        triples = zip(self.stacks, self.stops, levels, strict=True)
        return {stack.group.name: int(stops[level]) for stack, stops, level in triples}

    def place(self, stack: int, level: int) -> int | None:
        """Where in the ranking the chunk stands that takes ``stack`` one level down; None when it is at its end."""
        index = self.first[stack] + level
        return int(self.position[index]) if index < self.first[stack + 1] else None


def _fill(count: Count, ranking: _Ranking, levels: list[int], target: float) -> list[int]:
    kept = ranking.kept(levels)
    left = count(kept) - target
    waiting = [(place, s) for s, level in enumerate(levels) if (place := ranking.place(s, level)) is not None]
    heapq.heapify(waiting)
    too_much: list[tuple[int, int]] = []

    def cost(s: int) -> int:
        return count.step(kept, ranking.stacks[s].group, int(ranking.stops[s][levels[s] + 1]))

    while waiting:
        place, s = heapq.heappop(waiting)
        step = cost(s)
        if step > left:
            too_much.append((place, s))
            continue
        levels[s] += 1
        kept[ranking.stacks[s].group.name] = int(ranking.stops[s][levels[s]])
        left -= step
        further = ranking.place(s, levels[s])
        if further is not None:
            heapq.heappush(waiting, (further, s))
    if too_much:
        over, _, s = min((cost(s) - left, place, s) for place, s in too_much)
        if over < left:
            levels[s] += 1
    return levels

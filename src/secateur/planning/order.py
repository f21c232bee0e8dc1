"""The order in which a method of many cuts removes units, as scores: one run answers every smaller ratio.

The score of a unit is the number of the cut that removes it (from 0 on), and for a kept unit the number of all cuts.
Its fraction is the unit's place in the ranking of that cut. The cuts go in equal steps to ``Scores.reach``. A ratio at
which a cut ends is answered by exactly the units that this cut and those before it removed. A ratio between two cuts is
answered by the cuts before it, and the units that the next one removes first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.errors import PlanError
from secateur.planning.problem import Problem
from secateur.types import Removed, Scores

_SAME = 1e-6
"""Cuts: a ratio that is no further from the end of a cut is meant to be that."""


def extend(
    order: Mapping[str, torch.Tensor], problem: Problem, chosen: Removed, number: int
) -> dict[str, torch.Tensor]:
    """``order`` with cut ``number``, which removed ``chosen``: group name → ``[size]``, float64.

    Args:
        order: after the cuts before; empty before the first.
        problem: the one that the cut solved.
        chosen: all units that are removed now.
    """
    extended, units = {}, sum(stack.left for stack in problem.stacks.values())
    for name, places in ranking(problem).items():
        place = places.double() / units
        goes = torch.zeros(len(place), dtype=torch.bool)
        goes[torch.tensor(chosen.get(name, []), dtype=torch.long)] = True
        gone = torch.zeros_like(goes)
        gone[torch.tensor(sorted(problem.removed.get(name, ())), dtype=torch.long)] = True
        now = place + torch.where(goes, number, number + 1)
        extended[name] = torch.where(gone, order[name], now) if name in order else now
    return extended


def removed_before(order: Mapping[str, torch.Tensor], number: int) -> dict[str, list[int]]:
    """Group name → units that the cuts before ``number`` removed, ascending; only groups that lose units."""
    gone = {name: (values < number).nonzero().flatten().tolist() for name, values in order.items()}
    return {name: units for name, units in gone.items() if units}


def removed_at(scores: Scores, ratio: float) -> tuple[dict[str, list[int]], bool]:
    """The units that whole cuts of an order of removal took up to ``ratio``, and whether a cut ends there.

    Raises PlanError for a ratio beyond the end of the order.
    """
    assert scores.reach is not None
    if ratio > scores.reach * (1 + _SAME):
        raise PlanError(
            f"These scores are an order of removal that ends at a ratio of {scores.reach:g}, and {ratio:g} is beyond "
            "it. Ask for at most that, or prune again with a larger ratio."
        )
    cuts = max(int(scores[name].max()) for name in scores)
    done = ratio / scores.reach * cuts
    whole = int(done + _SAME)
    return removed_before(scores.values, whole), abs(done - whole) <= _SAME


def ranking(problem: Problem) -> dict[str, torch.Tensor]:
    """Place of each remaining unit in the ranking of all, from 0 on: group name → ``[size]``, int64.

    A unit is behind those of its group that go before it (``Stack.order``), whatever its score. Removed units have 0.
    """
    stacks = list(problem.stacks.values())
    prices = torch.cat([stack.scores.cummax(0).values for stack in stacks])  # a unit waits for those below it
    places = prices.argsort(stable=True).argsort()
    return {
        stack.group.name: torch.zeros(stack.group.size, dtype=torch.long).index_copy_(0, stack.order, part)
        for stack, part in zip(stacks, places.split([stack.left for stack in stacks]), strict=True)
    }

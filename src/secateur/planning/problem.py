"""The allocation problem: legal counts of each group, the exact size of the model for them, and the ratio to remove.

A strategy returns counts (group name → number of kept units), and ``Problem.choose`` turns them into units to remove.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from secateur.errors import PlanError
from secateur.planning.budget import Budget
from secateur.planning.shapes import legal_counts
from secateur.planning.stacks import Count, Stack, build_stack
from secateur.types import DependencyGraph, Kept, Scores

ROUNDING = 1e-9
"""Above this, one ratio exceeds another by more than the rounding of float64."""

Counts = Mapping[str, int]
"""Group name → number of kept units."""


@dataclass(frozen=True)
class Problem:
    """The groups that may be cut, with their legal counts, the parameters of a unit, and the ratio to remove.

    ``Problem.of`` states it for a whole model, ``part`` for some of its groups.
    """

    graph: DependencyGraph
    """Restricted to the budget, without adapters."""
    budget: Budget
    ratio: float
    """Fraction of all parameters to remove in the end."""
    stacks: Mapping[str, Stack]
    """Group name → the remaining units, lowest score first, and the parameters of one; in model order."""
    legal: Kept
    """Group name → numbers of units that it may keep in the end, ascending."""
    removed: Mapping[str, frozenset[int]]
    """Group name → units that are already removed, of any group."""
    count: Count
    """Counts → exact number of parameters of the whole model."""

    @classmethod
    def of(
        cls,
        graph: DependencyGraph,
        scores: Scores,
        budget: Budget,
        removed: Mapping[str, Iterable[int]] | None = None,
    ) -> Problem:
        """The problem of a whole model.

        Args:
            graph: of the model, plain or with adapters, restricted to ``budget`` (``restrict``).
            scores: of every group in ``graph.prunable``.
            budget: how much to remove, and by which rules.
            removed: units that are already removed; they count towards the ratio.

        Raises:
            PlanError: nothing can be cut, a score is missing, or ``removed`` is not of this model.
        """
        graph = countable(graph)
        gone = {name: frozenset(units) for name, units in (removed or {}).items()}
        for name, units in gone.items():
            if name not in graph or not units < _all_units(graph[name].size):
                raise PlanError(f"Already removed: {len(units)} units of {name}, which this model cannot lose.")
        groups = graph.prunable
        if not groups:
            # each of the most sensitive groups has its own number, which does not matter here
            by = f" ({budget.protect_by} moves"
            reasons = sorted({(group.protected or "").partition(by)[0] for group in graph})
            advice = " Lower budget.protect_share." if budget.protect_from is not None else ""
            raise PlanError(f"Nothing can be cut under this budget: {'; '.join(reasons)}.{advice}")
        for group in groups:
            if group.name not in scores or len(scores[group.name]) != group.size:
                raise PlanError(f"There must be one score for each of the {group.size} units of {group.name}.")
        stacks = {
            group.name: build_stack(graph, group, scores, gone.get(group.name, ()), budget.normalise)
            for group in groups
        }
        legal = {group.name: legal_counts(group, graph, budget.runs_on, budget.round_to) for group in groups}
        return cls(graph, budget, budget.ratio, stacks, legal, gone, Count(graph, gone, list(stacks.values())))

    def part(self, names: Iterable[str], ratio: float, removed: Mapping[str, Iterable[int]]) -> Problem:
        """The same problem for the groups ``names`` alone, while the others lose only ``removed``.

        Args:
            names: groups of this problem.
            ratio: fraction of all parameters of the model to remove, those of ``removed`` included.
            removed: units that are removed, of any group.
        """
        stacks = {name: self.stacks[name] for name in names}
        gone = {name: frozenset(units) for name, units in removed.items()}
        count = Count(self.graph, gone, list(stacks.values()))
        return replace(self, ratio=ratio, stacks=stacks, removed=gone, count=count)

    def target(self, ratio: float | None = None) -> float:
        """Kept parameters when ``ratio`` of all is removed; by default the problem's own ratio."""
        return self.count.total * (1 - (self.ratio if ratio is None else ratio))

    def ratio_of(self, counts: Counts) -> float:
        """Removed fraction of all parameters when the groups keep ``counts``."""
        return 1 - self.count(counts) / self.count.total

    @cached_property
    def least(self) -> dict[str, int]:
        """The smallest count of each group."""
        return {name: min(stack.left, self.legal[name][0]) for name, stack in self.stacks.items()}

    def floors(self, target: float) -> dict[str, int]:
        """The floor of each group: the first legal count of at least ``budget.floor`` times its size after an even cut.

        Args:
            target: number of parameters to which the even cut is made.
        """
        share = self._even_share(target)
        return {
            name: _at_least(self.legal[name], self.budget.floor * share * stack.group.size)
            for name, stack in self.stacks.items()
        }

    def choose(self, counts: Counts, *, on_the_way: bool = False) -> dict[str, list[int]]:
        """The units to remove when each group keeps its ``counts``: those with the lowest scores, and removed ones.

        Floors are not checked here. The strategy must respect them.

        Args:
            counts: groups that are not named keep all their remaining units.
            on_the_way: the model will be cut further, and counts need not be legal for a runtime yet.

        Returns:
            Group name → units, ascending, in model order; only groups that lose units.

        Raises:
            PlanError: a group cannot be cut, or its count is not legal.
        """
        gone = {name: set(units) for name, units in self.removed.items()}
        for name, kept in counts.items():
            self._check(name, kept, on_the_way)
            gone[name] = gone.get(name, set()) | set(self.stacks[name].lowest(kept))
        return {group.name: sorted(gone[group.name]) for group in self.graph if gone.get(group.name)}

    def _check(self, name: str, kept: int, on_the_way: bool) -> None:
        """Raise PlanError unless group ``name`` may keep ``kept`` units."""
        if name not in self.stacks:
            raise PlanError(
                f"{name} cannot be cut under this budget. Prunable groups: {', '.join(list(self.stacks)[:4])} ..."
            )
        left, legal = self.stacks[name].left, self.legal[name]
        steps = range(left, self.least[name] - 1, -self.stacks[name].group.runs)
        if kept == left or (kept < left and kept in (steps if on_the_way else legal)):
            return
        possible = [count for count in legal if count < left] + [left]
        near = sorted(sorted(possible, key=lambda count: abs(count - kept))[:2])
        raise PlanError(
            f"{name} has {left} units left, and cannot keep {kept} of them. The nearest numbers that it can keep: "
            f"{', '.join(map(str, near))}."
        )

    def _even_share(self, target: float) -> float:
        """The largest share s such that keeping s of every group (legal, at least one unit) is within the target."""

        def parameters(share: float) -> int:
            kept = {}
            for name, stack in self.stacks.items():
                kept[name] = min(stack.left, _at_least(self.legal[name], share * stack.group.size))
            return self.count(kept)

        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if parameters(middle) <= target else (low, middle)
        return low


def countable(graph: DependencyGraph) -> DependencyGraph:
    """The same graph without the parameters of LoRA adapters. It counts the model after merging."""
    shapes = {name: shape for name, shape in graph.shapes.items() if ".lora_" not in name}
    return graph if len(shapes) == len(graph.shapes) else replace(graph, shapes=shapes)


@cache
def _all_units(size: int) -> frozenset[int]:
    return frozenset(range(size))


def _at_least(legal: Sequence[int], count: float) -> int:
    """The smallest legal count that is not below ``count``; the group's size when there is none."""
    return legal[min(bisect_left(legal, count - 1e-9), len(legal) - 1)]

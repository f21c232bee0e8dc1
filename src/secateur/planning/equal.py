"""Equal widths: all groups of a kind and size keep the same number of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from secateur.errors import PlanError
from secateur.planning.problem import Problem
from secateur.planning.shapes import needs_equal_widths
from secateur.planning.stacks import Count, Stack
from secateur.types import Kept

_TOLERANCE = 0.02
"""Largest difference from the ratio asked, where a runtime's legal shapes force big steps."""
_COMBINATIONS = 256
"""Largest number of combinations of widths of the smaller classes to try."""
_EXACT = 0.005
"""Fraction of all parameters: combinations that miss the target by no more than this are treated as exact."""
_LARGE = 0.1
"""Fraction of the largest class's removable parameters that a class must be able to lose to absorb the rest."""


@dataclass(frozen=True)
class WidthClass:
    """Groups that keep the same number of units, because they have the same kind and size."""

    stacks: tuple[Stack, ...]
    counts: tuple[int, ...]
    """Numbers of units that each group may keep, descending."""

    def loss(self, count: int) -> float:
        """The removed sum of scores times parameters when each group keeps ``count`` units."""
        return sum(stack.loss(count) * stack.parameters for stack in self.stacks)

    def kept(self, count: int) -> dict[str, int]:
        return {stack.group.name: count for stack in self.stacks}


@dataclass(frozen=True)
class Combination:
    """One combination of widths."""

    kept: Mapping[str, int]
    parameters: int
    loss: float


def equal_counts(problem: Problem, ratio: float | None = None) -> dict[str, int]:
    """Units that each group keeps when all groups of a kind and size keep the same number; ``ratio`` as in
    ``allocate``."""
    stacks = list(problem.stacks.values())
    target = problem.target()
    floors = problem.floors(target)
    allowed = {name: _above(problem, name, floors[name]) for name in problem.stacks}
    final, looked_at = choose_equal(problem.count, width_classes(stacks, allowed), target)
    if needs_equal_widths(problem.budget.runs_on):
        _check_near(problem, final, looked_at)
    if ratio is None or ratio >= problem.ratio:
        return dict(final.kept)
    on_the_way = {
        name: range(final.kept[name], stack.left + 1, stack.group.runs) for name, stack in problem.stacks.items()
    }
    chosen, _ = choose_equal(problem.count, width_classes(stacks, on_the_way), problem.target(ratio))
    return dict(chosen.kept)


def _above(problem: Problem, name: str, floor: int) -> Sequence[int]:
    """The legal counts of a group from its floor up; those of the units left when all of them are below the floor."""
    left = [count for count in problem.legal[name] if count <= problem.stacks[name].left]
    return [count for count in left if count >= floor] or left[-1:]


def _check_near(problem: Problem, chosen: Combination, looked_at: Sequence[Combination]) -> None:
    """Raise PlanError when the chosen legal shape is too far from the ratio asked."""
    ratios = sorted({1 - widths.parameters / problem.count.total for widths in looked_at})
    asked, reached = problem.ratio, 1 - chosen.parameters / problem.count.total
    if abs(asked - reached) <= _TOLERANCE:
        return
    nearest = [
        max((r for r in ratios if 0 < r < asked), default=None),
        min((r for r in ratios if r > asked), default=None),
    ]
    raise PlanError(
        f"No shape that opens in {problem.budget.runs_on} is near a ratio of {asked:g}. "
        f"The nearest: {' and '.join(f'{r:.4f}' for r in nearest if r is not None)}. "
        "Ask for that, or set budget.runs_on to transformers."
    )


def width_classes(stacks: Sequence[Stack], allowed: Kept) -> list[WidthClass]:
    """Group stacks by kind and size; ``allowed`` are the counts that each group may keep."""
    table: dict[tuple[str, int], list[Stack]] = {}
    for stack in stacks:
        table.setdefault((stack.group.kind, stack.group.size), []).append(stack)
    classes = []
    for members in table.values():
        most = min(stack.left for stack in members)
        common = set.intersection(*(set(allowed[stack.group.name]) for stack in members))
        counts = {count for count in common if count <= most}
        if not counts:
            raise PlanError(
                f"No legal width is left for {members[0].group.name}: some of the {members[0].group.size} units that "
                "it needs are already removed. Start again from the whole model."
            )
        classes.append(WidthClass(tuple(members), tuple(sorted(counts, reverse=True))))
    return classes


def choose_equal(count: Count, classes: Sequence[WidthClass], target: float) -> tuple[Combination, list[Combination]]:
    """The combination of widths nearest to ``target`` parameters, and all combinations that were tried.

    Among those that are near enough (within one step of the finest class, and half a percent of all parameters), the
    one with the smallest loss of scores is chosen. This decides between heads and channels.
    """
    candidates = list(_candidates(count, classes, target))
    nearest = min(abs(candidate.parameters - target) for candidate in candidates)
    near = max(nearest, min(_finest_step(count, classes), _EXACT * count.total))
    best = min(
        (candidate for candidate in candidates if abs(candidate.parameters - target) <= near),
        key=lambda candidate: (candidate.loss, abs(candidate.parameters - target)),
    )
    return best, candidates


def _candidates(count: Count, classes: Sequence[WidthClass], target: float) -> list[Combination]:
    """Some combinations of the other classes, each with the two widths of the finest class around the target."""
    finest = _finest(count, classes)
    others = [item for index, item in enumerate(classes) if index != finest]
    most = max(2, int(_COMBINATIONS ** (1 / max(len(others), 1))))
    found = []
    for widths in product(*(_thin(item.counts, most) for item in others)):
        kept: dict[str, int] = {}
        for item, width in zip(others, widths, strict=True):
            kept.update(item.kept(width))
        loss = sum(item.loss(width) for item, width in zip(others, widths, strict=True))
        for width in _around(count, kept, classes[finest], target):
            whole = {**kept, **classes[finest].kept(width)}
            found.append(Combination(whole, count(whole), loss + classes[finest].loss(width)))
    return found


def _finest(count: Count, classes: Sequence[WidthClass]) -> int:
    """Index of the class with the most widths, of those with enough parameters to make up for the others.

    The feed-forward layers of three layers before sixty with experts have many widths, but few parameters.
    """
    start = {name: width for item in classes for name, width in item.kept(item.counts[0]).items()}
    spans = [count(start) - count({**start, **item.kept(item.counts[-1])}) for item in classes]
    large = [index for index, span in enumerate(spans) if span >= _LARGE * max(spans)]
    return max(large, key=lambda index: len(classes[index].counts))


def _around(count: Count, kept: Mapping[str, int], item: WidthClass, target: float) -> tuple[int, ...]:
    """The smallest width of ``item`` that leaves more than ``target`` parameters and the largest that does not."""
    low, high = 0, len(item.counts)
    while low < high:
        middle = (low + high) // 2
        if count({**kept, **item.kept(item.counts[middle])}) <= target:
            high = middle
        else:
            low = middle + 1
    return item.counts[max(low - 1, 0) : low + 1]


def _thin(counts: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most ``most`` of ``counts``, evenly spaced, with both ends."""
    if len(counts) <= most:
        return counts
    return tuple(counts[round(index * (len(counts) - 1) / (most - 1))] for index in range(most))


def _finest_step(count: Count, classes: Sequence[WidthClass]) -> float:
    start = {name: width for item in classes for name, width in item.kept(item.counts[0]).items()}
    steps = [count(start) - count({**start, **item.kept(item.counts[1])}) for item in classes if len(item.counts) > 1]
    return min(steps, default=0)

"""From scores and a budget to the units that go, counted exactly."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from secateur.errors import PlanError
from secateur.planning.budget import Budget, restrict
from secateur.planning.equal import Candidate, choose_equal, width_classes
from secateur.planning.ranked import choose_ranked
from secateur.planning.shapes import legal_counts, needs_equal_widths
from secateur.planning.stacks import Count, Stack, build_stack
from secateur.types import DependencyGraph, Scores

_TOLERANCE = 0.02
"""How far the ratio reached may be from the one asked where a runtime's legal shapes force big steps."""


def allocate(
    graph: DependencyGraph,
    scores: Scores,
    budget: Budget,
    removed: Mapping[str, Iterable[int]] | None = None,
    ratio: float | None = None,
) -> dict[str, list[int]]:
    """Choose the units that go so that the parameter count lands within one unit of the target.

    With uneven widths that is one unit of the smallest kind; with equal widths one step of the finest kind in all
    layers together; with rounding one rounding step. Parameters of LoRA adapters do not count: they will be merged.
    What is in ``removed`` never comes back, so that a progressive choice in a model of few, large heads may be off by
    a part of one of them.

    Args:
        graph: of the model, plain or with adapters.
        scores: of every group that the budget may cut (``restrict(graph, budget).prunable``).
        budget: how much, and from where.
        removed: what has gone already; it stays gone, and counts.
        ratio: a smaller target on the way to ``budget.ratio``, for progressive methods; None for the final one.
            On the way widths need not be legal for a runtime, but legal ones stay reachable.

    Returns:
        Group name → units that go, ascending, those in ``removed`` included; only groups that lose something.

    Raises:
        PlanError: the ratio cannot be reached (the message has the largest one), or no legal shape is near it.
    """
    problem = _problem(countable(graph), scores, budget, removed or {})
    _check_reachable(problem)
    kept = _equal(problem, ratio) if budget.equal_widths else _ranked(problem, ratio)
    result = dict(problem.gone)
    for stack in problem.stacks:
        result[stack.group.name] = result.get(stack.group.name, set()) | set(stack.lowest(kept[stack.group.name]))
    answer = {group.name: sorted(result[group.name]) for group in graph if result.get(group.name)}
    if not answer and ratio is None:
        raise PlanError(
            f"Removing {budget.ratio:.4g} of all parameters is less than what the smallest step takes within the floor "
            f"of every group; one step is {_smallest_step(problem) / problem.count.total:.4g}. Ask for a larger ratio, "
            "or lower budget.floor."
        )
    return answer


def _smallest_step(problem: _Problem) -> int:
    """Parameters of the cheapest step: one unit, or as many as a group, or all of equal widths, must lose at once."""
    steps: dict[object, int] = {}
    for stack in problem.stacks:
        group = stack.group
        below = [count for count in problem.legal[group.name] if count < stack.left]
        together = (group.kind, group.size) if problem.budget.equal_widths else group.name
        if below:
            steps[together] = steps.get(together, 0) + stack.parameters * (stack.left - below[-1])
    return min(steps.values(), default=0)


def countable(graph: DependencyGraph) -> DependencyGraph:
    """The same graph without the parameters of LoRA adapters, so that counting sees the model after merging."""
    shapes = {name: shape for name, shape in graph.shapes.items() if ".lora_" not in name}
    return graph if len(shapes) == len(graph.shapes) else replace(graph, shapes=shapes)


@dataclass(frozen=True)
class _Problem:
    """Everything that a choice depends on."""

    budget: Budget
    stacks: list[Stack]
    legal: dict[str, Sequence[int]]
    """Group name → numbers of units that it may keep in the end, ascending."""
    gone: dict[str, set[int]]
    count: Count

    def target(self, ratio: float) -> float:
        """Parameters that stay."""
        return self.count.total * (1 - ratio)


def _problem(graph: DependencyGraph, scores: Scores, budget: Budget, removed: Mapping[str, Iterable[int]]) -> _Problem:
    gone = {name: set(units) for name, units in removed.items()}
    for name, units in gone.items():
        if name not in graph or not units < _all_units(graph[name].size):
            raise PlanError(f"Already removed: {len(units)} units of {name}, which this model does not have to give.")
    groups = restrict(graph, budget).prunable
    if not groups:
        # of the most sensitive groups each has a number of its own, which says nothing here
        by = f" ({budget.protect_by} moves"
        reasons = sorted({(group.protected or "").partition(by)[0] for group in restrict(graph, budget)})
        advice = " Lower budget.protect_share." if budget.protect_from is not None else ""
        raise PlanError(f"Nothing can be cut under this budget: {'; '.join(reasons)}.{advice}")
    for group in groups:
        if group.name not in scores or len(scores[group.name]) != group.size:
            raise PlanError(f"There must be one score for each of the {group.size} units of {group.name}.")
    stacks = [build_stack(graph, g, scores, gone.get(g.name, ()), budget.normalise) for g in groups]
    return _Problem(
        budget=budget,
        stacks=stacks,
        legal={group.name: legal_counts(group, graph, budget.runs_on, budget.round_to) for group in groups},
        gone=gone,
        count=Count(graph, gone, stacks),
    )


@cache
def _all_units(size: int) -> frozenset[int]:
    return frozenset(range(size))


def _check_reachable(problem: _Problem) -> None:
    least = {stack.group.name: min(stack.left, problem.legal[stack.group.name][0]) for stack in problem.stacks}
    reachable = 1 - problem.count(least) / problem.count.total
    if problem.budget.ratio <= reachable:
        return
    budget, whole = problem.budget, []
    if set(budget.kinds) != {"ffn", "attention"}:
        whole.append("kinds")
    whole += [
        key for key in ("protect", "protect_first", "protect_last", "protect_from", "round_to") if getattr(budget, key)
    ]
    if needs_equal_widths(budget.runs_on):
        whole.append("runs_on")
    advice = f", or allow more ({', '.join(f'budget.{key}' for key in whole)})" if whole else ""
    raise PlanError(
        f"A ratio of {budget.ratio:g} of all parameters cannot be reached: what may be cut "
        f"({', '.join(sorted({stack.group.kind for stack in problem.stacks}))} in {len(problem.stacks)} groups) "
        f"makes at most {math.floor(reachable * 1000) / 1000:g}. Ask for at most that{advice}."
    )


def _ranked(problem: _Problem, ratio: float | None) -> dict[str, int]:
    """Units that each group keeps when all compete in one ranking."""
    target = problem.target(problem.budget.ratio if ratio is None else ratio)
    stops = []
    for stack, least in zip(problem.stacks, _least(problem, target), strict=True):
        legal = problem.legal[stack.group.name]
        between = legal[bisect_left(legal, least) : bisect_left(legal, stack.left)]
        stops.append(torch.tensor([stack.left, *reversed(between)]))
    return choose_ranked(problem.count, problem.stacks, stops, target)


def _least(problem: _Problem, target: float) -> list[int]:
    """The floor of each group: a legal count that is not below ``floor`` times its share of an even cut."""
    share = _even_share(problem, target)
    return [
        _at_least(problem.legal[stack.group.name], problem.budget.floor * share * stack.group.size)
        for stack in problem.stacks
    ]


def _even_share(problem: _Problem, target: float) -> float:
    """The largest share s such that keeping s of every group (legal, at least one unit) does not exceed the target."""

    def parameters(share: float) -> int:
        kept = {}
        for stack in problem.stacks:
            even = _at_least(problem.legal[stack.group.name], share * stack.group.size)
            kept[stack.group.name] = min(stack.left, even)
        return problem.count(kept)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) <= target else (low, middle)
    return low


def _at_least(legal: Sequence[int], count: float) -> int:
    """The smallest legal count that is not below ``count``; the group's size when there is none."""
    return legal[min(bisect_left(legal, count - 1e-9), len(legal) - 1)]


def _equal(problem: _Problem, ratio: float | None) -> dict[str, int]:
    """Units that each group keeps when all groups of a kind and size keep the same number."""
    target = problem.target(problem.budget.ratio)
    least = _least(problem, target)
    allowed = {
        stack.group.name: [count for count in problem.legal[stack.group.name] if count >= floor]
        for stack, floor in zip(problem.stacks, least, strict=True)
    }
    final, looked_at = choose_equal(problem.count, width_classes(problem.stacks, allowed), target)
    if needs_equal_widths(problem.budget.runs_on):
        _check_near(problem, final, looked_at)
    if ratio is None or ratio >= problem.budget.ratio:
        return dict(final.kept)
    on_the_way = {
        stack.group.name: range(final.kept[stack.group.name], stack.left + 1, stack.group.runs)
        for stack in problem.stacks
    }
    chosen, _ = choose_equal(problem.count, width_classes(problem.stacks, on_the_way), problem.target(ratio))
    return dict(chosen.kept)


def _check_near(problem: _Problem, chosen: Candidate, looked_at: Sequence[Candidate]) -> None:
    """PlanError when the legal shape that was chosen is too far from the ratio asked."""
    ratios = sorted({1 - candidate.parameters / problem.count.total for candidate in looked_at})
    asked, reached = problem.budget.ratio, 1 - chosen.parameters / problem.count.total
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

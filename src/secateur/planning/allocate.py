"""From scores and a budget to the units to remove, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from secateur.errors import PlanError
from secateur.planning.budget import Budget, restrict
from secateur.planning.equal import equal_counts
from secateur.planning.order import removed_at
from secateur.planning.problem import ROUNDING, Problem
from secateur.planning.ranked import ranked_counts
from secateur.planning.shapes import needs_equal_widths
from secateur.planning.shares import shared_counts
from secateur.types import DependencyGraph, Scores


class SmallRatioError(PlanError):
    """The ratio is smaller than the smallest step."""


def allocate(
    graph: DependencyGraph,
    scores: Scores,
    budget: Budget,
    removed: Mapping[str, Iterable[int]] | None = None,
    ratio: float | None = None,
) -> dict[str, list[int]]:
    """Choose the units to remove. The parameter count is within one unit of the target.

    With uneven widths that is one unit of the smallest kind; with equal widths, one step of the finest kind in all
    layers together; with rounding, one rounding step. Parameters of LoRA adapters do not count: they will be merged.
    Units in ``removed`` are never restored. A progressive choice in a model of few, large heads may therefore miss the
    target by a part of one head.

    Args:
        graph: of the model, plain or with adapters.
        scores: of every group that the budget may cut (``restrict(graph, budget).prunable``). An order of removal
            (``planning.order``) answers as the method would that made it; under a budget that forbids its cuts, it is
            taken as scores.
        budget: how much to remove, and from where.
        removed: units that are already removed; they count towards the ratio.
        ratio: a smaller target on the way to ``budget.ratio``, for progressive methods; None for the final one. Before
            the final one, widths need not be legal for a runtime, but legal ones must remain reachable.

    Returns:
        Group name → units to remove, ascending, those in ``removed`` included; only groups that lose units.

    Raises:
        PlanError: the ratio cannot be reached (the message has the largest one), or no legal shape is near it.
    """
    restricted = restrict(graph, budget)
    whole, exact = _whole_cuts(restricted, scores, budget, ratio)
    if exact and not removed:
        return {group.name: whole[group.name] for group in graph if group.name in whole}
    gone = {name: {*whole.get(name, ()), *(removed or {}).get(name, ())} for name in {*whole, *(removed or {})}}
    return solve(Problem.of(restricted, scores, budget, gone), ratio)


def _whole_cuts(
    graph: DependencyGraph, scores: Scores, budget: Budget, ratio: float | None
) -> tuple[dict[str, list[int]], bool]:
    """``order.removed_at`` for an order of removal; nothing for other scores, and where this budget forbids the cuts.

    Between the ends of the order, cuts have no legal widths for a budget of equal ones. It takes the order alone, and
    so does a budget of shares.
    """
    if scores.reach is None:
        return {}, False
    at = budget.ratio if ratio is None else ratio
    whole, exact = removed_at(scores, at)
    if budget.shares or (budget.equal_widths and at < scores.reach):
        return {}, False
    return (whole, exact) if _allows(Problem.of(graph, scores, budget), whole, at) else ({}, False)


def _allows(problem: Problem, removed: Mapping[str, list[int]], ratio: float) -> bool:
    """Whether the problem's budget allows to remove these units on the way to ``ratio``: groups, counts and floors."""
    floors = problem.floors(problem.target(ratio))
    for name, units in removed.items():
        if name not in problem.stacks or not set(units) <= set(problem.graph[name].movable):
            return False
        kept = problem.graph[name].size - len(units)
        if kept < floors[name] or kept not in problem.legal[name]:
            return False
    if not problem.budget.equal_widths:
        return True
    groups = [stack.group for stack in problem.stacks.values()]
    widths = {(group.kind, group.size, group.size - len(removed.get(group.name, ()))) for group in groups}
    return len(widths) == len({(group.kind, group.size) for group in groups})


def solve(problem: Problem, ratio: float | None = None) -> dict[str, list[int]]:
    """The units to remove, by the budget's strategy; ``ratio``, result and errors as in ``allocate``."""
    strategy = equal_counts if problem.budget.equal_widths else ranked_counts
    if problem.budget.shares:
        counts = shared_counts(problem, ratio, strategy)
    else:
        _check_reachable(problem)
        counts = strategy(problem, ratio)
    answer = problem.choose(counts, on_the_way=ratio is not None)
    if not answer and ratio is None:
        raise SmallRatioError(
            f"Removing {problem.ratio:.4g} of all parameters is less than the smallest step within the floor of every "
            f"group; one step is {_smallest_step(problem) / problem.count.total:.4g}. Ask for a larger ratio, or lower "
            "budget.floor."
        )
    return answer


def _smallest_step(problem: Problem) -> int:
    """Parameters of the cheapest step: one unit, or the units that a group, or all equal groups, must lose at once."""
    steps: dict[object, int] = {}
    for name, stack in problem.stacks.items():
        below = [count for count in problem.legal[name] if count < stack.left]
        together = (stack.group.kind, stack.group.size) if problem.budget.equal_widths else name
        if below:
            steps[together] = steps.get(together, 0) + stack.parameters * (stack.left - below[-1])
    return min(steps.values(), default=0)


def _check_reachable(problem: Problem) -> None:
    reachable = problem.ratio_of(problem.least)
    if problem.ratio <= reachable + ROUNDING:
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
        f"A ratio of {problem.ratio:g} of all parameters cannot be reached: the prunable groups ({len(problem.stacks)} "
        f"of kind {', '.join(sorted({stack.group.kind for stack in problem.stacks.values()}))}) allow at most "
        f"{math.floor(reachable * 1000) / 1000:g}. Ask for at most that{advice}."
    )

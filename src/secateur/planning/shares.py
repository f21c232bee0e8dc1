"""Groups with their own ratio (``budget.shares``); the rest of the budget is spread over the other groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from secateur.errors import PlanError
from secateur.planning.budget import Budget
from secateur.planning.problem import ROUNDING, Problem
from secateur.planning.shapes import needs_equal_widths
from secateur.types import DependencyGraph, NodeGroup

Strategy = Callable[[Problem, float | None], dict[str, int]]
"""Returns counts for a problem and an intermediate ratio, or None for the final ratio."""


@dataclass(frozen=True)
class Share:
    """The groups that one pattern of ``budget.shares`` names."""

    pattern: str
    own: float
    """Fraction of their own parameters to remove."""
    fraction: float
    """Their fraction of all parameters; protected groups count."""
    names: tuple[str, ...]
    """The prunable groups among them."""

    @property
    def ratio(self) -> float:
        """Fraction of all parameters of the model to remove from these groups."""
        return self.own * self.fraction


def shared_counts(problem: Problem, ratio: float | None, strategy: Strategy) -> dict[str, int]:
    """Units that each group keeps: every share reaches its own ratio, and the whole reaches the budget's.

    ``strategy`` spreads each share over its groups, and the rest of the budget over all others. Before the final ratio,
    all shares are scaled like the whole.

    Raises:
        PlanError: a pattern names no group that can be cut, or the ratios cannot be reached together.
    """
    shares = _shares(problem)
    _check_widths(problem, shares)
    _check_sum(problem, shares)
    progress = 1.0 if ratio is None else min(1.0, ratio / problem.ratio)
    counts: dict[str, int] = {}
    for share in shares:
        here = {name: units for name, units in problem.removed.items() if name in share.names}
        part = problem.part(share.names, share.ratio, here)
        _check_share(part, share)
        if share.own > 0:
            counts |= strategy(part, None if ratio is None else progress * part.ratio)
    named = {name for share in shares for name in share.names}
    others = [name for name in problem.stacks if name not in named]
    if others:
        rest = problem.part(others, problem.ratio, problem.choose(counts, on_the_way=ratio is not None))
        if progress == 1.0:
            _check_rest(rest, shares)
        counts |= strategy(rest, ratio)
    return counts


def share_of(budget: Budget, group: NodeGroup) -> str | None:
    """The pattern of ``budget.shares`` that ``group`` belongs to: the first that names it. None for no pattern."""
    return next((pattern for pattern in budget.shares if _matches(pattern, group)), None)


def parameters_in(graph: DependencyGraph, groups: Sequence[NodeGroup]) -> int:
    """Parameters that would go with all units of these groups together."""
    inside = {group.name for group in groups}
    return graph.parameter_count() - graph.parameter_count(
        {group.name: () for group in groups if group.within not in inside}
    )


def _matches(pattern: str, group: NodeGroup) -> bool:
    return pattern == group.kind or fnmatchcase(group.name, pattern)


def _shares(problem: Problem) -> list[Share]:
    """The shares of the budget; a group belongs to the first pattern that names it."""
    graph, shares = problem.graph, problem.budget.shares
    named: dict[str, list[NodeGroup]] = {pattern: [] for pattern in shares}
    for group in graph:
        pattern = share_of(problem.budget, group)
        if pattern is not None:
            named[pattern].append(group)
    found = []
    for pattern, groups in named.items():
        if not groups:
            raise PlanError(
                f"budget.shares: {pattern!r} names no group of its own. Give a kind, such as ffn, or names of groups, "
                "such as layers.0.*. A group with several matches belongs to the first."
            )
        names = tuple(group.name for group in groups if group.name in problem.stacks)
        if not names and shares[pattern] > 0:
            reasons = sorted({group.protected or "" for group in groups})
            raise PlanError(f"budget.shares: no group of {pattern!r} can be cut: {'; '.join(reasons)}.")
        fraction = parameters_in(graph, groups) / problem.count.total
        found.append(Share(pattern, shares[pattern], fraction, names))
    return found


def _check_widths(problem: Problem, shares: Sequence[Share]) -> None:
    """Raise PlanError when the runtime needs equal widths of groups that are in different shares."""
    if not needs_equal_widths(problem.budget.runs_on):
        return
    of = {name: share.pattern for share in shares for name in share.names}
    first: dict[tuple[str, int], str] = {}
    for name, stack in problem.stacks.items():
        other = first.setdefault((stack.group.kind, stack.group.size), name)
        if of.get(name) != of.get(other):
            raise PlanError(
                f"{problem.budget.runs_on} needs equal widths, and budget.shares has another ratio for {name} than for "
                f"{other}. Give shares to whole kinds only, or set budget.runs_on to transformers."
            )


def _check_sum(problem: Problem, shares: Sequence[Share]) -> None:
    """Raise PlanError when the shares alone remove more than the budget, or less when nothing else can be cut."""
    total = sum(share.ratio for share in shares)
    unit = max(stack.parameters for stack in problem.stacks.values()) / problem.count.total
    if total > problem.ratio + unit:
        raise PlanError(
            f"budget.shares alone removes {total:.4g} of all parameters, more than the {problem.ratio:g} of "
            "budget.ratio. Raise budget.ratio to that at least, or lower the shares."
        )
    named = {name for share in shares for name in share.names}
    if total < problem.ratio - unit and named >= problem.stacks.keys():
        raise PlanError(
            f"budget.shares names all prunable groups and removes {total:.4g} of all parameters, less than the "
            f"{problem.ratio:g} of budget.ratio. Set budget.ratio to that, or raise the shares."
        )


def _check_share(part: Problem, share: Share) -> None:
    if not share.names:
        return
    reachable = part.ratio_of(part.least)
    if share.ratio > reachable + ROUNDING:
        most = math.floor(reachable / share.fraction * 1000) / 1000
        raise PlanError(
            f"budget.shares: {share.own:g} of the parameters of {share.pattern} cannot be reached: their prunable "
            f"groups allow at most {most:g}. Ask for at most that."
        )


def _check_rest(rest: Problem, shares: Sequence[Share]) -> None:
    reachable = rest.ratio_of(rest.least)
    if rest.ratio > reachable:
        raise PlanError(
            f"A ratio of {rest.ratio:g} of all parameters cannot be reached with budget.shares: these remove "
            f"{sum(share.ratio for share in shares):.4g}, and with the other prunable groups ({len(rest.stacks)} of "
            f"kind {', '.join(sorted({stack.group.kind for stack in rest.stacks.values()}))}) at most "
            f"{math.floor(reachable * 1000) / 1000:g} is possible. Ask for at most that, or raise the shares."
        )

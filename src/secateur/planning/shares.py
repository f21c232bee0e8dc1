"""Groups that have a ratio of their own (``budget.shares``); the rest of the budget is spread over the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from secateur.errors import PlanError
from secateur.planning.problem import Problem
from secateur.planning.shapes import needs_equal_widths
from secateur.types import NodeGroup

Strategy = Callable[[Problem, float | None], dict[str, int]]
"""From a problem, and a ratio on the way or None for the final one, to counts."""


@dataclass(frozen=True)
class Share:
    """The groups that one pattern of ``budget.shares`` names."""

    pattern: str
    own: float
    """Fraction of their own parameters that must go."""
    fraction: float
    """Fraction of all parameters that these are; groups that stay whole count."""
    names: tuple[str, ...]
    """Those of them that can be cut."""

    @property
    def ratio(self) -> float:
        """Fraction of all parameters of the model that must go from these groups."""
        return self.own * self.fraction


def shared_counts(problem: Problem, ratio: float | None, strategy: Strategy) -> dict[str, int]:
    """Units that each group keeps: every share reaches its own ratio, and the whole reaches the budget's.

    ``strategy`` spreads each share over its groups, and what is left of the budget over all others. On the way to the
    final ratio all shares are the same fraction of it as the whole.

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


def _shares(problem: Problem) -> list[Share]:
    """The shares of the budget; a group belongs to the first pattern that names it."""
    graph, shares = problem.graph, problem.budget.shares
    named: dict[str, list[NodeGroup]] = {pattern: [] for pattern in shares}
    for group in graph:
        pattern = next((p for p in shares if p == group.kind or fnmatchcase(group.name, p)), None)
        if pattern is not None:
            named[pattern].append(group)
    found = []
    for pattern, groups in named.items():
        if not groups:
            raise PlanError(
                f"budget.shares: {pattern!r} names no group of its own. Give a kind, such as ffn, or names of groups, "
                "such as layers.0.*; a group that several name belongs to the first."
            )
        names = tuple(group.name for group in groups if group.name in problem.stacks)
        if not names and shares[pattern] > 0:
            reasons = sorted({group.protected or "" for group in groups})
            raise PlanError(f"budget.shares: nothing that {pattern!r} names can be cut: {'; '.join(reasons)}.")
        inside = {group.name for group in groups}
        whole = {group.name: () for group in groups if group.within not in inside}
        fraction = 1 - graph.parameter_count(whole) / problem.count.total
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
    """Raise PlanError when the shares alone take more than the budget, or less while nothing else can be cut."""
    total = sum(share.ratio for share in shares)
    unit = max(stack.parameters for stack in problem.stacks.values()) / problem.count.total
    if total > problem.ratio + unit:
        raise PlanError(
            f"budget.shares alone takes {total:.4g} of all parameters, more than the {problem.ratio:g} of "
            "budget.ratio. Raise budget.ratio to that at least, or lower the shares."
        )
    named = {name for share in shares for name in share.names}
    if total < problem.ratio - unit and named >= problem.stacks.keys():
        raise PlanError(
            f"budget.shares names all that can be cut and takes {total:.4g} of all parameters, less than the "
            f"{problem.ratio:g} of budget.ratio. Set budget.ratio to that, or raise the shares."
        )


def _check_share(part: Problem, share: Share) -> None:
    if not share.names:
        return
    reachable = part.ratio_of(part.least)
    if share.ratio > reachable:
        most = math.floor(reachable / share.fraction * 1000) / 1000
        raise PlanError(
            f"budget.shares: {share.own:g} of the parameters of {share.pattern} cannot be reached: what may be cut of "
            f"them makes at most {most:g}. Ask for at most that."
        )


def _check_rest(rest: Problem, shares: Sequence[Share]) -> None:
    reachable = rest.ratio_of(rest.least)
    if rest.ratio > reachable:
        raise PlanError(
            f"A ratio of {rest.ratio:g} of all parameters cannot be reached with budget.shares: these take "
            f"{sum(share.ratio for share in shares):.4g}, and with what else may be cut "
            f"({', '.join(sorted({stack.group.kind for stack in rest.stacks.values()}))} in {len(rest.stacks)} groups) "
            f"that makes at most {math.floor(reachable * 1000) / 1000:g}. Ask for at most that, or raise the shares."
        )

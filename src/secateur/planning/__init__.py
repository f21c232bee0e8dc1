"""From scores to a plan: budget, legal shapes, allocation, schedules."""

from __future__ import annotations

from secateur.planning.allocate import SmallRatioError, allocate, solve
from secateur.planning.budget import Budget, restrict
from secateur.planning.order import extend, ranking, removed_before
from secateur.planning.plan import decoder_ratio, describe_plan, make_plan, versions
from secateur.planning.problem import Counts, Problem, countable
from secateur.planning.schedule import by_period, cubic
from secateur.planning.shares import parameters_in, share_of
from secateur.planning.switches import Levels, Switches

__all__ = [
    "Budget",
    "Counts",
    "Levels",
    "Problem",
    "SmallRatioError",
    "Switches",
    "allocate",
    "by_period",
    "countable",
    "cubic",
    "decoder_ratio",
    "describe_plan",
    "extend",
    "make_plan",
    "parameters_in",
    "ranking",
    "removed_before",
    "restrict",
    "share_of",
    "solve",
    "versions",
]

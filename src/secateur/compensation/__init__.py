"""Compensation for removed units in closed form: the weights that consume the kept units are refitted."""

from __future__ import annotations

from secateur.compensation.gram import Gram, Solution, solve_refit
from secateur.compensation.refit import (
    EVERY,
    Compensated,
    Refit,
    Target,
    check_refittable,
    check_removable,
    compensate,
    remove_and_compensate,
)

__all__ = [
    "EVERY",
    "Compensated",
    "Gram",
    "Refit",
    "Solution",
    "Target",
    "check_refittable",
    "check_removable",
    "compensate",
    "remove_and_compensate",
    "solve_refit",
]

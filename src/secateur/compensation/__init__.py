"""Compensation for removed units: consumers of the kept ones refitted in closed form, and blocks trained one by one."""

from __future__ import annotations

from secateur.compensation.database import Database
from secateur.compensation.gram import Gram, Solution, solve_refit
from secateur.compensation.guard import EVERY, Guarded, Target
from secateur.compensation.reconstruct import Block, Reconstructed, Reconstruction, check_reconstructable, reconstruct
from secateur.compensation.refit import (
    Compensated,
    Refit,
    check_refittable,
    check_removable,
    compensate,
    remove_and_compensate,
)

__all__ = [
    "EVERY",
    "Block",
    "Compensated",
    "Database",
    "Gram",
    "Guarded",
    "Reconstructed",
    "Reconstruction",
    "Refit",
    "Solution",
    "Target",
    "check_reconstructable",
    "check_refittable",
    "check_removable",
    "compensate",
    "reconstruct",
    "remove_and_compensate",
    "solve_refit",
]

"""Schedules of a progressive run: fractions of the target, from 0 to 1, by step. Pure functions."""

from __future__ import annotations


def cubic(step: int, steps: int, warm_up: float = 0.1, cool_down: float = 0.1) -> float:
    """Fraction of the target at ``step``: fast at first, slow at the end (LoRAPrune's schedule, after Zhu and Gupta).

    ``1 − (1 − x)³`` with x rising from 0 to 1 between the end of the warm-up and the beginning of the cool-down.

    Args:
        step: 0-based; beyond ``steps`` the fraction is 1.
        steps: length of the run.
        warm_up: fraction of the run at the beginning with fraction 0.
        cool_down: fraction of the run at the end with fraction 1.
    """
    start, end = warm_up * steps, (1 - cool_down) * steps
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return 1 - (1 - (step - start) / (end - start)) ** 3


def by_period(period: int, periods: int) -> float:
    """Fraction of the target in period ``period`` (0-based) of ``periods`` equal ones: LoRAShear's K / P each time."""
    if periods < 1:
        raise ValueError(f"at least one period is needed; got {periods}")
    return min(1.0, (period + 1) / periods)

"""The rows of a comparison, one for each method and ratio, and the dense model that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

Numbers = Mapping[str, float]

_STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
"""The perplexity of a badly damaged model may be infinite. JSON must keep that value."""


DENSE = "dense"
"""The name in the method column for the dense model."""


class Row(BaseModel):
    """One method at one ratio. A value that could not be measured is None or empty."""

    model_config = _STRICT

    method: str
    ratio: float
    """Asked for, of all parameters."""
    code: str = ""
    """For a method of one's own, or such criteria in its saliency: a digest of their files
    (``methods.method_source``)."""
    settings: dict[str, Any] = {}
    """The method's own settings."""
    kinds: list[str] = []
    """Kinds of groups that it cut."""
    reached: float | None = None
    decoder: float | None = None
    """Fraction of the decoder layers' parameters that was removed."""
    parameters: int | None = None
    pruning_steps: int = 0
    """Optimiser steps while pruning."""
    recovery_steps: int = 0
    """Optimiser steps after it; the sum is the same for all methods."""
    pruned: dict[str, float] = {}
    """Perplexity by source before recovery."""
    recovered: dict[str, float] = {}
    tasks: dict[str, dict[str, float]] = {}
    """Task → metric → value, after recovery; ``<metric>_stderr`` beside it."""
    scoring_seconds: float | None = None
    """Wall time of choosing the units, in seconds. For a method that trains while it prunes, it includes training."""
    scoring_peak_bytes: int | None = None
    scoring_extra_bytes: int | None = None
    """Bytes on top of the memory in use at its start (the model, the program)."""
    speed: dict[str, dict[str, float]] = {}
    """Batch → prefill and decode tokens per second of the result, and of the dense model timed in turns with it."""
    error: str | None = None
    """Why there is no result."""


class Retention(NamedTuple):
    """The kept share of a task's accuracy above guessing."""

    share: float
    """1 equals the dense model; below 0 is worse than guessing."""
    stderr: float | None
    """To first order, from the standard errors of both accuracies, as if they were independent. Answers to the same
    questions are correlated, therefore the true error is smaller. None where the harness gives none."""


class Leaderboard(BaseModel):
    """All rows, and their shared facts."""

    model_config = _STRICT

    model: str
    seed: int
    recipe: str
    """The settings that all rows share, as YAML. Method, its settings, ratio and steps are in the row."""
    window: int
    tokens: dict[str, int]
    """Source → tokens that perplexity is measured on."""
    steps: int
    """Optimiser steps that every method may train for, while pruning and after."""
    tokens_per_step: int
    dense: dict[str, float]
    dense_parameters: int
    dense_tasks: dict[str, dict[str, float]] = {}
    chance: dict[str, float] = {}
    """Task → accuracy of guessing. Tasks without choices are left out: guessing gets nothing there."""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    rows: list[Row] = []

    def mean(self, perplexity: Numbers) -> float | None:
        """Perplexity over all sources together: exp of the token-weighted mean loss."""
        if not self.tokens or not set(self.tokens) <= set(perplexity):
            return None
        loss = sum(count * math.log(perplexity[source]) for source, count in self.tokens.items())
        return math.exp(loss / sum(self.tokens.values()))

    @property
    def dense_row(self) -> Row:
        """The dense model, as a row beside the others."""
        row = Row(method=DENSE, ratio=0.0, reached=0.0, decoder=0.0, parameters=self.dense_parameters)
        row.pruned, row.tasks = self.dense, self.dense_tasks
        return row

    def retention(self, row: Row, task: str) -> Retention | None:
        """Chance-corrected: (accuracy − guessing) / (dense accuracy − guessing); None where that is not meaningful.

        The dense model is compared with itself, and has no error.
        """
        values, dense, chance = row.tasks.get(task), self.dense_tasks.get(task), self.chance.get(task, 0.0)
        metric = metric_of(dense or {})
        if values is None or dense is None or metric is None or metric not in values:
            return None
        above = dense[metric] - chance
        if above <= 0:
            return None
        share, error = (values[metric] - chance) / above, f"{metric}_stderr"
        if row.method == DENSE or error not in values or error not in dense:
            return Retention(share, None)
        return Retention(share, math.hypot(values[error], share * dense[error]) / above)

    def mean_retention(self, row: Row) -> Retention | None:
        """Mean over the tasks that have one."""
        found = [value for task in self.dense_tasks if (value := self.retention(row, task)) is not None]
        if not found:
            return None
        errors = [one.stderr for one in found if one.stderr is not None]
        error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
        return Retention(sum(one.share for one in found) / len(found), error)


def metric_of(values: Numbers) -> str | None:
    """The accuracy that a task is judged by: normalised by length where the harness has that."""
    return next((name for name in ("acc_norm", "acc") if name in values), None)

"""Measures a model: perplexity, tasks, size and speed."""

from __future__ import annotations

from secateur.evaluation.divergence import Divergence, divergence, with_remainder
from secateur.evaluation.efficiency import Speed, as_written, compare_speed, machine, parameter_count
from secateur.evaluation.perplexity import TextLoss, Windows, losses_by_source, perplexity, text_loss
from secateur.evaluation.settings import EvaluationSettings
from secateur.evaluation.tasks import evaluate_tasks

__all__ = [
    "Divergence",
    "EvaluationSettings",
    "Speed",
    "TextLoss",
    "Windows",
    "as_written",
    "compare_speed",
    "divergence",
    "evaluate_tasks",
    "losses_by_source",
    "machine",
    "parameter_count",
    "perplexity",
    "text_loss",
    "with_remainder",
]

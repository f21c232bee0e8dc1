"""The one place that builds a ``transformers.Trainer``, and what it trains: LoRA adapters, or all weights."""

from __future__ import annotations

from secateur.training.checkpoints import StatefulCallback
from secateur.training.full import full_weights
from secateur.training.lora import LoraSettings, attach_lora, merge_lora
from secateur.training.trainer import Loss, Penalty, Schedule, TrainingSettings, train

__all__ = [
    "LoraSettings",
    "Loss",
    "Penalty",
    "Schedule",
    "StatefulCallback",
    "TrainingSettings",
    "attach_lora",
    "full_weights",
    "merge_lora",
    "train",
]

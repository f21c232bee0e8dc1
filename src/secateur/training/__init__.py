"""The one place that builds a ``transformers.Trainer``, and the LoRA adapters it trains."""

from __future__ import annotations

from secateur.training.checkpoints import StatefulCallback
from secateur.training.lora import LoraSettings, attach_lora, merge_lora
from secateur.training.trainer import Penalty, Schedule, TrainingSettings, train

__all__ = [
    "LoraSettings",
    "Penalty",
    "Schedule",
    "StatefulCallback",
    "TrainingSettings",
    "attach_lora",
    "merge_lora",
    "train",
]

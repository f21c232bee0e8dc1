"""Recovery of the lost knowledge after the cut."""

from __future__ import annotations

from secateur.recovery.cache import CachedTeacher
from secateur.recovery.finetune import Recovered, RecoveryTask, keep_predictions, recover, source_losses
from secateur.recovery.settings import RecoverySettings

__all__ = [
    "CachedTeacher",
    "Recovered",
    "RecoverySettings",
    "RecoveryTask",
    "keep_predictions",
    "recover",
    "source_losses",
]

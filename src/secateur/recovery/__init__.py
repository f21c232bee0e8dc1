"""Recovery of the lost knowledge after the cut."""

from __future__ import annotations

from secateur.recovery.finetune import Recovered, RecoverySettings, RecoveryTask, recover, source_losses

__all__ = [
    "Recovered",
    "RecoverySettings",
    "RecoveryTask",
    "recover",
    "source_losses",
]

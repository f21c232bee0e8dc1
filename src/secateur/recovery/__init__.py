"""Growing the lost knowledge back after the cut."""

from __future__ import annotations

from secateur.recovery.finetune import Recovered, RecoverySettings, RecoveryTask, recover, source_losses
from secateur.recovery.repair import Refit, check_repairable, repair

__all__ = [
    "Recovered",
    "RecoverySettings",
    "RecoveryTask",
    "Refit",
    "check_repairable",
    "recover",
    "repair",
    "source_losses",
]

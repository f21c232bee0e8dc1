"""Growing the lost knowledge back after the cut."""

from __future__ import annotations

from secateur.recovery.finetune import RecoverySettings, recover

__all__ = ["RecoverySettings", "recover"]

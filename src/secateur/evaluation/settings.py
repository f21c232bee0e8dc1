"""What a run measures before and after, and on what text."""

from __future__ import annotations

from pydantic import Field

from secateur.data import TextSettings
from secateur.precision import Precision


class EvaluationSettings(TextSettings):
    """Perplexity over held-out text, speed, and the comparison with pruning without LoRA."""

    tokens: int = Field(default=16_384, ge=2)
    """Tokens of held-out text, in whole windows; or what the text has, where that is less but at least 8 windows."""
    batch_size: int = Field(default=4, ge=1)
    """Windows per forward pass; changes memory, not the result."""
    precision: Precision = "auto"
    """``bf16``: autocast over fp32 weights; ``auto``: bf16 where the processor computes in it; or ``fp32``."""
    baseline: str | None = "wanda"
    """One-shot method that a run with LoRA is compared with at the same ratio, before recovery; null for none."""
    speed: bool = True
    """Whether prefill and decoding are timed, dense and pruned in turns."""

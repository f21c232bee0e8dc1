"""The measurements of a run before and after pruning, and their text."""

from __future__ import annotations

from pydantic import Field

from secateur.data import TextSettings
from secateur.precision import Precision


class EvaluationSettings(TextSettings):
    """Perplexity over held-out text, speed, and the comparison with pruning without LoRA."""

    tokens: int = Field(default=16_384, ge=2)
    """Tokens of held-out text, in whole windows. If the text has less, but at least 8 windows, all of it is used."""
    batch_size: int = Field(default=4, ge=1)
    """Windows per forward pass. It changes memory, not the result."""
    precision: Precision = "auto"
    """``bf16``: autocast over fp32 weights; ``auto``: bf16 where the processor supports it; or ``fp32``."""
    baseline: str | None = "wanda"
    """One-shot method for comparison with a run with LoRA, at the same ratio, before recovery; null for none."""
    speed: bool = True
    """Whether prefill and decoding are timed, for the dense and the pruned model in turns."""

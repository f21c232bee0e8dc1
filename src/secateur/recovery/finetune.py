"""Recovery by LoRA fine-tuning: adapters on the small model, a mixture of texts, merged at the end."""

from __future__ import annotations

from pydantic import Field
from transformers import PreTrainedModel

from secateur.data import TextSettings, TokenBlocks
from secateur.training import LoraSettings, TrainingSettings, attach_lora, merge_lora, train


class RecoverySettings(TextSettings):
    """What the model reads while it is trained: during progressive pruning and in the recovery after it.

    Blocks are drawn at random from ``tokens`` tokens, training.batch_size in a step, and again when they run out.
    """

    tokens: int = Field(default=524_288, ge=2)
    """Tokens to draw from, in whole windows; or what the text has, where that is less but at least 8 windows."""

    steps: int = Field(default=70, ge=0)
    """Optimiser steps of the recovery after the cut; 0 switches recovery off."""


def recover(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    steps: int,
    lora: LoraSettings,
    training: TrainingSettings,
    seed: int,
) -> list[dict[str, float]]:
    """Fine-tune ``model`` in place by LoRA on ``blocks`` and merge the adapters; returns the training log."""
    adapted = attach_lora(model, lora, seed)
    log = train(adapted, blocks.ids, training, steps=steps, seed=seed, description="recovering")
    merge_lora(adapted)
    return log

"""LoRA adapters: attached before training, merged into the weights afterwards (with peft)."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from transformers import PreTrainedModel

from secateur.errors import InputError
from secateur.types import Settings


class LoraSettings(Settings):
    """The adapters that guide pruning and recover the lost knowledge (LoRA, arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """LoRA rank r."""
    alpha: int = Field(default=16, ge=1)
    """Numerator of the scaling alpha / r that multiplies B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear modules that get an adapter, or ``all-linear``: every one but the output head."""


def attach_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Wrap the model's linears in fresh adapters (B = 0, so the function is unchanged); only A and B train.

    Adapters of a model without weights have no weights either. Raises InputError when ``settings.targets`` matches
    nothing.
    """
    targets = "all-linear" if settings.targets == ("all-linear",) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    # forked: the caller's own random stream must not change
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
        except ValueError as error:
            raise InputError(
                f"lora.targets={list(settings.targets)} finds no linear module in {type(model).__name__}: {error} "
                "Name modules as in `secateur inspect`, or use all-linear."
            ) from error
    _refuse_tied(adapted)
    return adapted


def _refuse_tied(adapted: PeftModel) -> None:
    """Raise InputError for an adapter on a tied head: merging it would change the embedding as well."""
    base: Any = adapted.get_base_model()
    shared = base.get_input_embeddings().weight
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and getattr(module.get_base_layer(), "weight", None) is shared:
            adapted.unload()
            raise InputError(
                f"lora.targets names {name}, whose weight is tied to the embedding. Remove it from lora.targets."
            )


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Add (alpha / r) B A to the base weights and remove the adapters. The function is unchanged."""
    merged: PreTrainedModel = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged

"""Comparisons that decide "good", and the refusal of models that do not compute numbers.

Every comparison with NaN is false, and an infinite scale allows every difference. Therefore each test here states the
condition for "good", and requires finite numbers, at least one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.finite import first_not_finite
from secateur.loading.library import explained


class Agreement(NamedTuple):
    """The difference between found and expected values."""

    difference: float
    """Largest difference; NaN when there is nothing to compare, or the shapes differ."""
    scale: float
    """Largest absolute expected value."""
    good: bool
    """Whether both are finite, and the difference is at most the tolerance times the scale (at least 1)."""


def agreement(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Agreement:
    """Compare two tensors of one shape; ``good`` is false for empty tensors, other shapes, NaN and infinity."""
    if found.shape != expected.shape or not found.numel():
        return Agreement(math.nan, math.nan, False)
    difference = float((found.float() - expected.float()).abs().max())
    scale = float(expected.float().abs().max())
    return Agreement(difference, scale, is_small(difference, tolerance * max(scale, 1.0)))


def is_small(value: Any, allowed: float) -> bool:
    """Whether ``value`` is a finite number of at most ``allowed``, which must be finite too; None is not."""
    return value is not None and math.isfinite(value) and math.isfinite(allowed) and value <= allowed


def sample_ids(config: PreTrainedConfig, length: int = 24) -> torch.Tensor:
    """Token ids ``[2, length]`` for the proof: arbitrary, spread over the vocabulary, and always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.get_text_config().vocab_size, (2, length), generator=generator)


def check_finite(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Raise ModelError when ``model`` does not compute, when its logits are not finite, or when a weight is not finite
    in its own type or in ``dtype``.

    It checks all weights, and runs a few tokens through the model.
    """
    for name, weight in model.named_parameters():
        _check_weight(name, weight.detach(), dtype or weight.dtype)
    training = model.training
    model.eval()
    kind = model.config.model_type
    try:
        with explained(f"This {kind} model does not compute", model.config._name_or_path or f"the {kind} model"):
            where = first_not_finite(model, sample_ids(model.config).to(model.device))
    finally:
        model.train(training)
    if where is not None:
        raise ModelError(
            f"The logits of this {kind} model are not finite (NaN or infinite); it begins in {where}. No result of it "
            "could be checked. Correct the model, or open it in another type (--set model.dtype=float32)."
        )


def _check_weight(name: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return
    least, most = torch.aminmax(weight)
    largest = torch.maximum(least.abs(), most.abs())
    if not bool(torch.isfinite(largest)):
        raise ModelError(
            f"The weight {name} is not finite: it contains NaN or infinity. Download or save the model again."
        )
    if not bool(torch.isfinite(largest.to(dtype))):
        short = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"The weight {name} holds {float(largest):.3g}, which is infinite in {short} (its largest number is "
            f"{torch.finfo(dtype).max:.3g}). Write bfloat16 or float32: --set export.dtype=float32."
        )

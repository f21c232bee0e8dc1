"""How well a model predicts text: loss and perplexity over windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.progress import Bar

_POSITIONS_PER_CHUNK = 512  # fp32 logits of so many positions at a time: 100 MB for a vocabulary of 50,000


@dataclass(frozen=True)
class TextLoss:
    """Mean negative log-likelihood of text, with what it was measured on."""

    loss: float
    """Nats per predicted token."""
    tokens: int
    """Tokens that were predicted: every one of each window but the first."""
    window: int
    """Tokens per window; each window is read on its own."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def text_loss(
    model: nn.Module, ids: torch.Tensor, *, batch_size: int = 4, autocast: torch.dtype | None = None
) -> TextLoss:
    """Mean negative log-likelihood of positions 1 … window-1 of every window, each given the positions before it.

    Args:
        model: a causal LM of transformers (or a peft model around one), on any device; its mode is restored.
        ids: int64 ``[blocks, window]``, window at least 2.
        batch_size: windows per forward pass.
        autocast: type to compute matrix products in (``torch.bfloat16``), or None for the model's own. The log-softmax
            is always float32.

    Raises:
        ModelError: the model computes NaN.
    """
    with Bar("measuring perplexity", _batches(ids, batch_size)) as bar:
        return _text_loss(model, ids, batch_size, autocast, bar)


def perplexity(
    model: nn.Module, ids: torch.Tensor, *, batch_size: int = 4, autocast: torch.dtype | None = None
) -> float:
    """``exp`` of ``text_loss``: perplexity over windows ``[blocks, window]`` that do not overlap."""
    return text_loss(model, ids, batch_size=batch_size, autocast=autocast).perplexity


def losses_by_source(
    model: nn.Module, blocks: TokenBlocks, *, batch_size: int = 4, autocast: torch.dtype | None = None
) -> dict[str, TextLoss]:
    """``text_loss`` for each source of ``blocks``, by source name."""
    parts = {name: blocks.of_source(name).ids for name in blocks.names}
    with Bar("measuring perplexity", sum(_batches(ids, batch_size) for ids in parts.values())) as bar:
        return {name: _text_loss(model, ids, batch_size, autocast, bar) for name, ids in parts.items()}


def _batches(ids: torch.Tensor, batch_size: int) -> int:
    return math.ceil(ids.shape[0] / batch_size)


def _text_loss(
    model: nn.Module, ids: torch.Tensor, batch_size: int, autocast: torch.dtype | None, bar: Bar
) -> TextLoss:
    """``text_loss`` that moves a bar on, one step a batch."""
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ModelError(
            f"Perplexity needs token ids [blocks, window] with a window of at least 2; got {tuple(ids.shape)}."
        )
    total = torch.zeros((), dtype=torch.float64)
    with _evaluating(model), torch.no_grad():
        for batch in ids.split(batch_size):
            total += _batch_loss(model, batch, autocast)
            bar.advance()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    loss = float(total) / tokens
    if math.isnan(loss):
        raise ModelError(_why_nan(model))
    return TextLoss(loss, tokens, ids.shape[1])


def _why_nan(model: nn.Module) -> str:
    if all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.is_floating_point()):
        return "The model computes NaN on this text. Try dtype float32 without autocast."
    return (
        "The model computes NaN because its weights are not finite. If it was trained here, training diverged: lower "
        "training.learning_rate, or clip gradients (training.max_grad_norm)."
    )


def _batch_loss(model: nn.Module, batch: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    """Summed loss of one batch, a float64 scalar on the CPU."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(input_ids=batch, use_cache=False).logits
    predictions, targets = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    chunks = zip(predictions.split(_POSITIONS_PER_CHUNK), targets.split(_POSITIONS_PER_CHUNK), strict=True)
    losses = [F.cross_entropy(logit.float(), target, reduction="sum") for logit, target in chunks]
    return torch.stack(losses).cpu().double().sum()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

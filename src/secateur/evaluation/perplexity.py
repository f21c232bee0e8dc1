"""Loss and perplexity of a model over windows of text that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from secateur.data import TokenBlocks, check_ids
from secateur.errors import ModelError
from secateur.finite import first_not_finite
from secateur.progress import Bar
from secateur.token_loss import LogitReader


@dataclass(frozen=True)
class TextLoss:
    """Mean negative log-likelihood of text, with the number of tokens and the window."""

    loss: float
    """Nats per predicted token."""
    tokens: int
    """Tokens that were predicted: every one of each window but those that begin it (``Windows.scored``)."""
    window: int
    """Tokens per window; each window is read on its own."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Windows:
    """The windows of a perplexity: how text is cut, and which tokens are scored. It is part of ``metrics.json``."""

    tokens: int
    """Per window, marks included."""
    begin_with: list[str]
    """Tokens that the tokenizer puts before a text (BOS), and therefore before each window; empty when there are
    none."""
    stride: int
    """Tokens of text from the beginning of one window to that of the next: windows do not overlap."""
    scored: int
    """Number of scored tokens at the end of each window, each given the tokens before it in the window: all but
    ``begin_with``, or all but the first one when that is empty."""

    @classmethod
    def of(cls, blocks: TokenBlocks, tokenizer: PreTrainedTokenizerBase | None) -> Windows:
        marks = list(blocks.marks)
        names = [str(mark) for mark in marks] if tokenizer is None else tokenizer.convert_ids_to_tokens(marks)
        return cls(blocks.window, list(names), blocks.window - len(marks), blocks.window - max(1, len(marks)))


def text_loss(
    model: nn.Module, ids: torch.Tensor, *, marks: int = 0, batch_size: int = 4, autocast: torch.dtype | None = None
) -> TextLoss:
    """Mean negative log-likelihood of positions 1 … window-1 of every window, each given the positions before it.

    Args:
        model: a causal LM of transformers (or a peft model around one), on any device; its mode is restored.
        ids: int64 ``[blocks, window]``, window at least 2.
        marks: tokens that the tokenizer puts at the start of every window. They are not scored. Without them, the first
            token is not scored.
        batch_size: windows per forward pass.
        autocast: type to compute matrix products in (``torch.bfloat16``), or None for the model's own. The log-softmax
            is always float32.

    Raises:
        ModelError: there is nothing to score, or the model computes NaN or infinity.
        DataError: a token has no row in the model's embedding.
    """
    with Bar("measuring perplexity", _batches(ids, batch_size)) as bar:
        return _text_loss(model, ids, marks, batch_size, autocast, bar)


def perplexity(
    model: nn.Module, ids: torch.Tensor, *, marks: int = 0, batch_size: int = 4, autocast: torch.dtype | None = None
) -> float:
    """``exp`` of ``text_loss``: perplexity over windows ``[blocks, window]`` that do not overlap."""
    return text_loss(model, ids, marks=marks, batch_size=batch_size, autocast=autocast).perplexity


def losses_by_source(
    model: nn.Module, blocks: TokenBlocks, *, batch_size: int = 4, autocast: torch.dtype | None = None
) -> dict[str, TextLoss]:
    """``text_loss`` for each source of ``blocks``, by source name. Raises ModelError when there is none."""
    parts = {name: blocks.of_source(name).ids for name in blocks.names}
    if not parts:
        raise ModelError("Perplexity needs text, and there is no window of any source.")
    marks = len(blocks.marks)
    with Bar("measuring perplexity", sum(_batches(ids, batch_size) for ids in parts.values())) as bar:
        return {name: _text_loss(model, ids, marks, batch_size, autocast, bar) for name, ids in parts.items()}


def _batches(ids: torch.Tensor, batch_size: int) -> int:
    return math.ceil(ids.shape[0] / batch_size)


def _text_loss(
    model: nn.Module, ids: torch.Tensor, marks: int, batch_size: int, autocast: torch.dtype | None, bar: Bar
) -> TextLoss:
    """``text_loss`` that moves a bar on, one step a batch."""
    first = max(1, marks)
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] <= first:
        raise ModelError(
            f"Perplexity needs token ids [blocks, window] with a window of at least {first + 1}; got "
            f"{tuple(ids.shape)}."
        )
    check_ids(ids, model, "The text")
    total = 0.0
    device = next(model.parameters()).device
    with _evaluating(model):
        reader = LogitReader(model, ids[:1].to(device))
        for batch in ids.split(batch_size):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss = _batch_loss(reader, batch.to(device), first)
            if not math.isfinite(loss):
                raise ModelError(_why_not_finite(model, batch, autocast))
            total += loss
            bar.advance()
    tokens = ids.shape[0] * (ids.shape[1] - first)
    return TextLoss(total / tokens, tokens, ids.shape[1])


def _why_not_finite(model: nn.Module, batch: torch.Tensor, autocast: torch.dtype | None) -> str:
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        place = first_not_finite(model, batch.to(device))
    if place not in dict(model.named_parameters()):
        return (
            f"The model computes NaN or infinity on this text, first in {place or 'its loss'}. Try dtype float32 "
            "without autocast."
        )
    return (
        f"The model computes NaN or infinity because its weights are not finite, first in {place}. If it was trained "
        "here, training diverged: lower training.learning_rate, or clip gradients (training.max_grad_norm)."
    )


def _batch_loss(reader: LogitReader, batch: torch.Tensor, first: int) -> float:
    """Summed loss of one batch from position ``first`` on."""
    losses: list[torch.Tensor] = []

    def add(rows: slice, here: slice, logits: torch.Tensor) -> None:
        skipped = max(0, first - 1 - here.start)
        targets = batch[rows, here.start + 1 + skipped : here.stop + 1].flatten().to(logits.device)
        losses.append(F.cross_entropy(logits[:, skipped:].flatten(0, 1), targets, reduction="sum"))

    reader.read(batch, add)
    return float(torch.stack(losses).cpu().double().sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

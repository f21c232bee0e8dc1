"""Perplexity against the slow definition, and what must not change it."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn

from secateur import token_loss
from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.evaluation import losses_by_source, perplexity, text_loss
from secateur.progress import Bar
from secateur.testing.tiny import VOCAB, build


def ids(blocks: int = 5, window: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (blocks, window), generator=torch.Generator().manual_seed(seed))


def slow_loss(model: nn.Module, rows: torch.Tensor) -> float:
    """Position by position, in float64."""
    losses = []
    with torch.no_grad():
        for row in rows:
            for position in range(1, len(row)):
                logits = model(row[None, :position]).logits[0, -1].double()
                losses.append(float(logits.logsumexp(0) - logits[row[position]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "mixtral"])
def test_it_is_the_mean_over_predicted_tokens(name: str) -> None:
    model, rows = build(name), ids(3, 9)
    result = text_loss(model, rows)
    assert result.loss == pytest.approx(slow_loss(model, rows), abs=1e-4)
    assert (result.tokens, result.window) == (3 * 8, 9)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-gqa")
    whole = perplexity(model, ids(), batch_size=5)
    assert perplexity(model, ids(), batch_size=2) == pytest.approx(whole, rel=1e-5)
    assert perplexity(model, ids(), batch_size=99) == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(token_loss, "_READ", 7 * VOCAB)
    assert perplexity(model, ids(), batch_size=5) == pytest.approx(whole, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = build("llama-gqa")
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, ids()) == pytest.approx(97, rel=1e-4)


def test_autocast_is_near_and_not_the_same() -> None:
    model = build("llama-gqa")
    full, half = text_loss(model, ids()), text_loss(model, ids(), autocast=torch.bfloat16)
    assert half.loss == pytest.approx(full.loss, abs=0.05)
    assert half.loss != full.loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_sources_are_measured_apart() -> None:
    model, rows = build("llama-gqa"), ids(6)
    blocks = TokenBlocks(rows, ("b", "a", "b", "b", "a", "b"))
    losses = losses_by_source(model, blocks)
    assert list(losses) == ["a", "b"]
    assert losses["a"].loss == pytest.approx(text_loss(model, rows[[1, 4]]).loss, rel=1e-5)
    mean = sum(loss.loss * loss.tokens for loss in losses.values()) / sum(loss.tokens for loss in losses.values())
    assert mean == pytest.approx(text_loss(model, rows).loss, rel=1e-5)


def test_one_bar_counts_the_batches_of_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("secateur.evaluation.perplexity")
    bars: list[Bar] = []

    class Seen(Bar):
        def __init__(self, description: str, total: int) -> None:
            super().__init__(description, total)
            bars.append(self)

    monkeypatch.setattr(module, "Bar", Seen)
    losses_by_source(build("llama-gqa"), TokenBlocks(ids(6), ("b", "a", "b", "b", "a", "b")), batch_size=3)
    assert [(bar.done, bar.total) for bar in bars] == [(3, 3)]


def test_mode_and_gradients_are_left_alone() -> None:
    model = build("llama-gqa").train()
    text_loss(model, ids())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model(ids()).logits.sum().backward()  # no inference tensors were left in the model


def test_what_cannot_be_measured_is_an_error() -> None:
    model = build("llama-gqa")
    for rows in (ids(0), ids(2, 1), ids().flatten()):
        with pytest.raises(ModelError, match=r"\[blocks, window\]"):
            text_loss(model, rows)
    with pytest.raises(ModelError, match="no window of any source"):
        losses_by_source(model, TokenBlocks(ids(0), ()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_computes_no_numbers_has_no_perplexity(value: float) -> None:
    model = build("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"weights are not finite, first in .*layers\.1\.mlp\.up_proj.*learning_rate"):
        text_loss(model, ids())
    model = build("llama-gqa")
    rows = ids()
    target = rows[3, 7]  # of one position alone
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, target, value))
    with pytest.raises(ModelError, match=r"NaN or infinity on this text, first in lm_head.*float32"):
        losses_by_source(model, TokenBlocks(rows, ("a",) * 5))

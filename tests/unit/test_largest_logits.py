"""No pass over text holds more logits than a piece, and none computes logits that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from secateur import token_loss
from secateur.data import TokenBlocks
from secateur.evaluation import Divergence, text_loss
from secateur.graph import trace
from secateur.importance import CRITERIA, knowledge
from secateur.testing.largest_logits import LargestLogits
from secateur.testing.tiny import HIDDEN, VOCAB, build
from secateur.types import DependencyGraph
from secateur.walk import Calibration, LayerStack, Moments, borrowed, watched

WINDOWS, WINDOW = 4, 12
MOST = 2 * WINDOWS * VOCAB
"""Two positions of all windows; less than the logits of one window."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_READ", MOST)
    monkeypatch.setattr(token_loss, "_LOGITS", MOST)
    monkeypatch.setattr(token_loss, "_ROWS", 1)


def text() -> Calibration:
    ids = torch.randint(3, VOCAB, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(0))
    return Calibration(TokenBlocks(ids, ("noise",) * WINDOWS), WINDOWS)


def _divergence(model: Any, graph: DependencyGraph) -> None:
    found = Divergence(text(), likeliest=8)
    found.read(model, range(WINDOWS))
    found.of(model, range(WINDOWS))


def _analysis(model: Any, graph: DependencyGraph, cached: bool) -> None:
    scores = CRITERIA["magnitude"]().score(model, graph, None, 0)
    knowledge.measure_cuts(model, graph, text(), knowledge.cuts(graph, scores, [0.5]), cached=cached)


PASSES: dict[str, Callable[[Any, DependencyGraph], Any]] = {
    "fisher": lambda model, graph: CRITERIA["fisher"]().score(model, graph, text(), 0),
    "taylor": lambda model, graph: CRITERIA["taylor"]().score(model, graph, text(), 0),
    "perplexity": lambda model, graph: text_loss(model, text().ids),
    "perplexity after marks": lambda model, graph: text_loss(model, text().ids, marks=4),
    "divergence": _divergence,
    "analysis by layers": lambda model, graph: _analysis(model, graph, True),
    "analysis by whole passes": lambda model, graph: _analysis(model, graph, False),
}


@pytest.mark.parametrize("name", PASSES)
def test_no_more_logits_than_a_piece_are_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-gqa")
    graph = trace(model)
    # its trial runs 16 tokens at once, whatever the text
    monkeypatch.setattr(LayerStack, "_try_out", lambda self: None)
    with LargestLogits() as seen:
        PASSES[name](model, graph)
    assert 0 < seen.most <= MOST


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_activations_need_no_logits(name: str) -> None:
    model = build("llama-gqa")
    graph = trace(model)
    with LargestLogits() as seen:
        CRITERIA[name]().score(model, graph, text(), 0)
    assert 0 < seen.most <= token_loss._TRIAL * VOCAB  # those of the trial on a few tokens


@pytest.mark.parametrize("split", [True, False])
def test_a_head_that_is_watched_sees_every_position_once(split: bool) -> None:
    model, whole = build("llama-gqa"), Moments(1, HIDDEN)
    with torch.no_grad(), watched(model, {"lm_head.weight": whole}):
        model(text().ids)
    found, reader = Moments(1, HIDDEN), text().reader(model)
    if not split:
        reader.split = None
    with borrowed(model), watched(model, {"lm_head.weight": found}), LargestLogits() as seen:
        text().run(reader, "activations")
    assert found.tokens.tolist() == whole.tokens.tolist() == [WINDOWS * WINDOW]
    torch.testing.assert_close(found.mean_square, whole.mean_square)
    assert seen.most <= (MOST if split else WINDOW * VOCAB)

"""The KL to the dense model: that of the plain formula, from the likeliest tokens and the mass of all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.evaluation import Divergence
from secateur.testing.method_contract import noise
from secateur.testing.tiny import VOCAB, build
from secateur.walk import Calibration

TEXT = Calibration(noise(5, 0), batch_size=2)


def plain(dense: torch.Tensor, other: torch.Tensor) -> float:
    """From logits ``[n, window, vocabulary]``."""
    log_p, log_q = (logits[:, :-1].double().log_softmax(-1) for logits in (dense, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def changed() -> tuple[Any, Any]:
    return build("llama-gqa"), build("llama-gqa", seed=1)


@pytest.mark.parametrize("rows", [[0], [3, 1], [0, 1, 2, 3, 4]])
def test_with_the_whole_vocabulary_it_is_the_plain_formula(rows: list[int]) -> None:
    dense, other = changed()
    divergence = Divergence(TEXT, likeliest=VOCAB)
    divergence.read(dense, rows)
    with torch.no_grad():
        expected = plain(dense(TEXT.ids[rows]).logits, other(TEXT.ids[rows]).logits)
    assert divergence.of(other, rows) == pytest.approx(expected, rel=1e-4)
    assert divergence.of(dense, rows) == pytest.approx(0, abs=1e-5)


def test_a_bucket_for_the_other_tokens_never_adds() -> None:
    dense, other = changed()
    found = []
    for likeliest in (1, 8, 40, VOCAB):
        divergence = Divergence(TEXT, likeliest)
        divergence.read(dense, [0, 1])
        found.append(divergence.of(other, [0, 1]))
    assert found == sorted(found)
    assert 0 < found[0] < found[-1]


def test_the_dense_model_reads_each_window_once() -> None:
    dense, other = changed()
    divergence = Divergence(TEXT)
    divergence.read(dense, [0, 1])
    before = divergence.of(other, [0, 1])
    divergence.read(other, [0, 1, 2])
    assert divergence.of(other, [0, 1]) == before
    assert divergence.of(other, [2]) == pytest.approx(0, abs=1e-5)


def test_a_model_that_gives_nan_is_infinitely_far() -> None:
    dense, other = changed()
    divergence = Divergence(TEXT)
    divergence.read(dense, [0])
    with torch.no_grad():
        other.get_parameter("model.norm.weight").fill_(float("nan"))
    assert divergence.of(other, [0]) == float("inf")

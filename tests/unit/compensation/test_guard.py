"""Check windows: their loss is the model's own, and is computed without the logits of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import token_loss
from secateur.compensation.guard import EVERY, guarded
from secateur.evaluation import Divergence
from secateur.graph import trace
from secateur.testing.method_contract import noise
from secateur.testing.tiny import VOCAB, build
from secateur.token_loss import Split
from secateur.types import Cut
from secateur.walk import Calibration

WINDOW = 64
TEXT = Calibration(noise(4 * EVERY, 0, WINDOW), batch_size=4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return found


def _no_split(model: Any, ids: torch.Tensor) -> Split | None:
    return None


@pytest.fixture(params=[True, False], ids=["split", "whole"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_READ", 4 * 8 * VOCAB)
    if not request.param:
        monkeypatch.setattr(token_loss, "split_model", _no_split)


def _guard(model: Any) -> None:
    graph = trace(model)
    found = guarded(model, graph, Cut.removing(graph, {"layers.0.mlp": [0]}), TEXT, {}, {})
    assert found.loss_before > 0


def _divergence(model: Any) -> None:
    divergence = Divergence(TEXT, likeliest=8)
    divergence.read(model, range(4))
    assert divergence.of(model, range(4)) == pytest.approx(0, abs=1e-5)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("read", [_guard, _divergence])
def test_no_tensor_is_as_large_as_the_logits_of_a_batch(read: Callable[[Any], None]) -> None:
    with Largest() as largest:
        read(build("llama-gqa"))
    assert largest.elements < 0.75 * 4 * (WINDOW - 1) * VOCAB


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_the_loss_is_the_models_own(family: str) -> None:
    model = build(family)
    graph = trace(model)
    found = guarded(model, graph, Cut.removing(graph, {}), TEXT, {}, {})
    check = TEXT.ids[EVERY - 1 :: EVERY]
    with torch.no_grad():
        own = float(model(input_ids=check, labels=check).loss)
    assert found.loss_before == pytest.approx(own, rel=1e-5)

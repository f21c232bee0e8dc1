"""Every method reads as much text as it says: tokens through the layers are counted, with and without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.methods import METHODS, Method, PruningTask
from secateur.planning import Budget
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.training import LoraSettings, TrainingSettings
from secateur.walk import Calibration

WINDOW, WINDOWS, BATCH = 48, 25, 2
PROBES = 0.08
"""Share of the text that tests of a few tokens read. It does not grow with the text."""
SHORT: Mapping[str, list[dict[str, Any]]] = {
    "lorashear": [{"periods": 2, "period_steps": 3}, {"warmup_steps": 2, "saliency": {"wanda": 1.0, "taylor": 1.0}}],
    "loraprune": [{"steps": 10}],
    "ddp": [{"steps": 10}, {"steps": 10, "distillation": 0.0}],
    "wanda": [{}, {"inputs": "pruned"}],
    "llm-pruner": [{}, {"rounds": 2, "form": "mixed"}],
    "obs": [{}, {"target": "own"}, {"target": "stream"}],
    "gisp": [{"cuts": 4}, {"windows": None, "cuts": 3}, {"cuts": 4, "saliency": {"fisher": 1.0, "wanda": 1.0}}],
    "evopress": [
        {"generations": 4, "children": [4, 2], "windows": [1, 4]},
        {"generations": 2, "children": [4], "windows": [9]},
    ],
    "bypass": [{"steps": 30}, {"steps": 6, "windows": 7}],
}
"""Settings of each method, where its defaults are not all that there is to count."""


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[bool, float]]:
    """Tokens that a whole pass would have, by whether gradients were on. Parts of a pass count as a part: attention and
    MLP are half of a layer each."""
    tokens = {False: 0.0, True: 0.0}
    halves = [module for name, module in model.named_modules() if name.endswith(("q_proj", "gate_proj"))]

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens[torch.is_grad_enabled()] += inputs[0].shape[:-1].numel() / len(halves)

    handles = [half.register_forward_pre_hook(count) for half in halves]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in METHODS:
        for settings in SHORT.get(name, [{}]):
            yield name, settings


@pytest.mark.parametrize(("name", "settings"), cases())
def test_a_method_reads_what_it_says(name: str, settings: dict[str, Any]) -> None:
    method: Method = METHODS[name](METHODS[name].Settings.model_validate(settings))
    model = build("llama-gqa")
    budget = Budget(ratio=0.2, kinds=method.kinds) if method.kinds else Budget(ratio=0.2)
    task = PruningTask(
        model=model,
        tokenizer=None,
        graph=trace(model),
        budget=budget,
        calibration=Calibration(noise(WINDOWS, 1, WINDOW)),
        training_blocks=noise(20, 2, WINDOW),
        lora=LoraSettings(rank=4),
        training=TrainingSettings(batch_size=BATCH, precision="fp32"),
    )
    with counted(model) as found:
        method.run(task)
    reading, step, text = method.reading, BATCH * WINDOW, WINDOWS * WINDOW
    forward = reading.forward * text + reading.forward_windows * WINDOW + reading.dense_steps * step
    gradient = reading.gradient * text + reading.gradient_windows * WINDOW + method.training_steps * step
    assert found[True] == pytest.approx(gradient, rel=0.01)
    assert found[False] + 3 * found[True] == pytest.approx(forward + 3 * gradient, rel=0.2)
    assert found[False] == pytest.approx(forward, rel=0.2, abs=PROBES * text)

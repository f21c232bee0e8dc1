"""ShortGPT from end to end: fewer layers, a plain config, and what masking the layers would compute."""

from __future__ import annotations

from pathlib import Path

import torch

import secateur
from secateur.methods import METHODS, PruningTask
from secateur.planning import Budget, make_plan
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.walk import Calibration


def test_layers_go_and_the_folder_is_plain(tmp_path: Path) -> None:
    model = build("llama-odd")
    graph = secateur.trace(model)
    budget = Budget(ratio=0.25, kinds=("layer",))
    decision = METHODS["shortgpt"]().run(PruningTask(model, None, graph, budget, calibration=Calibration(noise(6, 1))))
    [gone] = decision.removed["layers"]
    plan = make_plan(graph, decision.removed, budget, method="shortgpt")

    expected = build("llama-odd")
    del expected.model.layers[gone]
    ids = noise(2, 3).ids
    with torch.no_grad():
        want = expected(ids, use_cache=False).logits
        small = secateur.apply_plan(plan, model)
        torch.testing.assert_close(small(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
    assert small.config.num_hidden_layers == 2
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.parameters_after

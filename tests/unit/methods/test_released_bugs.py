"""What the released codes of LoRAPrune, LLM-Pruner, Wanda-sp and FLAP do wrong, or cannot do: none of it here.

The list is that of a reading of their sources; each test says which point it holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.importance import LoRA, WandaSP
from secateur.importance.flap import Fluctuation
from secateur.importance.llm_pruner import Salience, salience
from secateur.importance.lora import AdapterGradients
from secateur.methods import METHODS
from secateur.methods.base import PruningTask
from secateur.methods.loraprune import LoRAPrune, LoRAPruneSettings
from secateur.planning import Budget, make_plan, restrict
from secateur.surgery import slice_model
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.training import LoraSettings, TrainingSettings, attach_lora
from secateur.types import Cut, Scores
from secateur.walk import Calibration, borrowed


def task(family: str, **budget: Any) -> PruningTask:
    model = build(family)
    training = TrainingSettings(batch_size=4, precision="fp32")
    text = Calibration(noise(4, 1)), noise(8, 2)
    return PruningTask(model, None, trace(model), Budget(**budget), *text, LoraSettings(rank=4), training)


def guided(alpha: int, loss_scale: float = 1.0) -> Scores:
    """LoRA-guided scores of a tiny model at LoRA's start, from gradients ``loss_scale`` times too large."""
    model: Any = attach_lora(build("llama-gqa"), LoraSettings(rank=4, alpha=alpha), seed=0)
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    with borrowed(model, adapters) as trained:
        Calibration(noise(4, 1)).backward(model)
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.grad *= loss_scale
        return AdapterGradients(model, trace(model), LoRA(normalise=True, sides="both")).scores()


def same(one: Scores, other: Scores) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)


def test_loraprune_bug_1_the_gradient_ignored_the_scale_of_the_adapter() -> None:
    assert same(guided(alpha=4), guided(alpha=64))


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_loraprune_bugs_2_and_4_the_ratio_was_of_fewer_layers_and_ended_below_the_target(ratio: float) -> None:
    given = task("llama-gqa", ratio=ratio)
    decision = LoRAPrune(LoRAPruneSettings(steps=4, every=3)).run(given)  # every does not divide the steps
    plan = make_plan(given.graph, decision.removed, given.budget, method="loraprune")
    unit = max(given.graph.unit_cost(group) for group in given.graph.prunable)
    assert abs(plan.ratio_reached - ratio) * plan.parameters_before <= unit


def test_loraprune_bug_6_a_loss_scale_changed_the_share_of_the_quadratic_term() -> None:
    assert same(guided(alpha=8), guided(alpha=8, loss_scale=1024.0))


@pytest.mark.parametrize("family", ["llama-mqa", "llama-odd", "qwen2"])
@pytest.mark.parametrize("method", ["loraprune", "llm-pruner", "wanda", "flap", "magnitude", "random"])
def test_loraprune_bug_7_sizes_of_heads_were_written_into_all_codes(family: str, method: str) -> None:
    """Grouped queries, odd head counts, and biases that are tensors: what goes leaves a model that computes."""
    given = task(family, ratio=0.15, floor=0.0)
    own = {"steps": 2, "every": 1} if method == "loraprune" else {}
    chosen = METHODS[method]
    decision = chosen(chosen.Settings.model_validate(own)).run(given)
    kept = Cut.removing(given.graph, decision.removed)
    assert kept
    slice_model(given.model, given.graph, kept)
    assert given.model(input_ids=noise(1, 3).ids).logits.isfinite().all()


def test_llm_pruner_bug_the_sign_of_the_mixed_form_was_lost_in_attention() -> None:
    one = torch.ones(1)
    assert salience(one, one, 4 * one, "mixed").item() == 1  # |w g − ½ w² q| = |1 − 2|
    assert salience(one, -one, 4 * one, "mixed").item() == 3
    model = build("llama-gqa")
    graph = restrict(trace(model), Budget(ratio=0.2, kinds=("attention",)))
    forms: tuple[Any, ...] = ("first", "second", "mixed")
    first, second, mixed = (Salience(form=form).score(model, graph, Calibration(noise(4, 1)), 0) for form in forms)
    for name in mixed:
        assert not torch.equal(mixed[name], first[name])
        assert (mixed[name] <= first[name] + 0.5 * second[name] + 1e-6).all()
        assert (mixed[name] >= (first[name] - 0.5 * second[name]).abs() - 1e-6).all()


def test_llm_pruner_bug_gradients_of_all_weights_were_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only weights that a group lives on that may be cut have one."""
    held: set[str] = set()

    def watched(self: Calibration, model: Any) -> float:
        loss = backward(self, model)
        held.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        return loss

    backward = Calibration.backward
    monkeypatch.setattr(Calibration, "backward", watched)
    model = build("llama-gqa")
    Salience().score(model, restrict(trace(model), Budget(ratio=0.2, kinds=("ffn",))), Calibration(noise(4, 1)), 0)
    assert held
    assert all(".mlp." in name for name in held)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_wanda_sp_and_flap_bug_sequences_of_zeros_were_counted(family: str) -> None:
    """The mean is over the tokens that there are: the same text twice gives the same scores, with biases or without."""
    model, blocks = build(family), noise(4, 1)
    graph = trace(model)
    twice = TokenBlocks(torch.cat([blocks.ids, blocks.ids]), (*blocks.sources, *blocks.sources))
    for criterion in (WandaSP(), Fluctuation()):
        once, again = (criterion.score(model, graph, Calibration(text), 0) for text in (blocks, twice))
        assert same(once, again)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "llama-mqa"])
def test_flap_bug_the_cost_of_a_head_was_a_constant(family: str) -> None:
    """Parameters are counted, so that the ratio is met whatever a head costs beside a channel."""
    given = task(family, ratio=0.2, floor=0.0)
    decision = METHODS["flap"]().run(given)
    plan = make_plan(given.graph, decision.removed, given.budget, method="flap")
    unit = max(given.graph.unit_cost(group) for group in given.graph.prunable)
    assert abs(plan.ratio_reached - 0.2) * plan.parameters_before <= unit

"""Small models with wide vocabularies: most parameters are embeddings, which are not cut.

A Gemma 3 with one KV head and BOS, whose hidden width three query heads do not divide; and a Qwen 2 whose FFN is five
times as wide as its hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.compensation import Gram
from secateur.config import load_recipe, revise
from secateur.errors import PlanError
from secateur.graph import trace
from secateur.planning import Budget, Problem, allocate, restrict
from secateur.surgery.stand_in import randomise
from secateur.testing.tiny import SPECS, VOCAB
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.types import Scores

WINDOW, BOS = 24, 1
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 2500}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "intermediate_size": 216, "vocab_size": 875}),
}
COMMON = {"hidden_size": 40, "head_dim": 10, "num_hidden_layers": 3, "tie_word_embeddings": True}
TEXT = {"text": "letters.txt", "window": WINDOW}
RECIPE = {
    "model": {"name": "tiny"},
    "budget": {"ratio": 0.2},
    "calibration": {**TEXT, "tokens": 20 * WINDOW},
    "recovery": {**TEXT, "tokens": 20 * WINDOW, "steps": 0, "repair_tokens": 20 * WINDOW},
    "evaluation": {**TEXT, "tokens": 8 * WINDOW, "speed": False, "baseline": None},
    "training": {"precision": "fp32"},
}


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def build(shape: str) -> PreTrainedModel:
    family, own = SHAPES[shape]
    config = AutoConfig.for_model(family, **{**SPECS[shape][1], **COMMON, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, 0)
    return model.eval()


def prune(model: PreTrainedModel, method: str, *, bos: bool = False, **flags: Any) -> secateur.Result:
    recipe = revise(load_recipe(flags=RECIPE), flags)
    return secateur.prune(model, tiny_tokenizer(add_bos=bos), method=method, recipe=recipe)


@pytest.mark.parametrize("method", ["fisher", "flap", "gisp", "llm-pruner", "obs", "taylor", "wanda"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_reaches_a_fifth_of_all_parameters(shape: str, method: str) -> None:
    model = build(shape)
    assert model.get_input_embeddings().weight.numel() > 0.25 * model.num_parameters()
    keys = [layer.self_attn.k_proj.out_features for layer in model.model.layers]
    result = prune(model, method, bos=shape == "gemma3")
    unit = max(result.graph.unit_cost(group) for group in result.graph.prunable)
    assert abs(result.plan.ratio_reached - 0.2) * result.plan.parameters_before <= unit
    for layer, before in zip(model.model.layers, keys, strict=True):
        attention = layer.self_attn
        assert attention.o_proj.in_features >= 10
        assert attention.k_proj.out_features == before or shape == "qwen2"  # the one KV head stays
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(3, 27).view(2, 12)).logits).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_reached_up_to_its_limit_and_refused_beyond(shape: str) -> None:
    graph = trace(build(shape))
    draw = torch.Generator().manual_seed(0)
    scores = Scores({group.name: torch.rand(group.size, generator=draw) for group in graph.prunable})
    budget = Budget()
    problem = Problem.of(restrict(graph, budget), scores, budget)
    limit = problem.ratio_of(problem.least)
    assert limit < 0.75
    for ratio in (limit / 4, limit / 2, limit - 1e-3):
        removed = allocate(graph, scores, budget.model_copy(update={"ratio": ratio}))
        kept = {name: graph[name].size - len(removed.get(name, ())) for name in problem.stacks}
        assert min(kept.values()) >= 1
        assert problem.ratio_of(kept) == pytest.approx(ratio, abs=1e-3)
    with pytest.raises(PlanError, match="allow at most"):
        allocate(graph, scores, budget.model_copy(update={"ratio": limit + 1e-3}))


def test_layers_whose_heads_do_not_divide_the_hidden_width_are_saved(tmp_path: Path) -> None:
    """Two of three layers keep three query heads, and the hidden width is 40."""
    model = build("gemma3")
    flags = {"budget.kinds": ["attention"], "budget.ratio": 0.01, "recovery.repair": False}
    recipe = revise(load_recipe(flags=RECIPE), flags)
    secateur.prune(model, tiny_tokenizer(add_bos=True), method="magnitude", recipe=recipe, output=tmp_path / "out")
    widths = [layer.self_attn.o_proj.in_features for layer in model.model.layers]
    assert sorted(widths) == [30, 30, 40]
    opened, _ = secateur.load(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_every_window_that_the_model_reads_begins_with_bos() -> None:
    """Scores, repair, training and evaluation. Trials draw from the whole vocabulary; text has its first 97 tokens."""
    model, seen = build("gemma3"), []

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] == WINDOW and int(args[0].max()) < VOCAB:
            seen.append(args[0].detach().cpu())

    model.get_input_embeddings().register_forward_pre_hook(look)
    prune(model, "fisher", bos=True, **{"recovery.steps": 2})
    rows = torch.cat(seen)
    assert len(rows) > 2 * 8 + 20 + 20  # more than evaluation, scores and repair read
    assert bool((rows[:, 0] == BOS).all())


@pytest.mark.parametrize("method", ["fisher", "obs"])
def test_the_first_positions_are_in_no_sum_of_products(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """BOS is an attention sink: a hundred times as large as other tokens, it would decide every refit."""
    counts: list[int] = []
    add = Gram.add

    def counted(self: Gram, x: torch.Tensor, y: torch.Tensor) -> None:
        counts.append(len(x))
        add(self, x, y)

    monkeypatch.setattr(Gram, "add", counted)
    prune(build("gemma3"), method, bos=True)
    assert sum(counts) % (20 * (WINDOW - 4)) == 0
    assert sum(counts) >= 3 * 20 * (WINDOW - 4)

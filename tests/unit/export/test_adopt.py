"""A model that was cut in memory describes itself, so that it can be pruned again, saved and opened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.errors import ModelError
from secateur.export import adopt_config, check_describes_itself, standard_form
from secateur.export.huggingface import shapes_of, write
from secateur.graph import trace
from secateur.loading import load
from secateur.surgery import protect_failing, slice_model
from secateur.testing.tiny import TINY
from secateur.types import DependencyGraph

IDS = torch.arange(3, 25)[None]
Kept = dict[str, list[int]]


def even(graph: DependencyGraph, times: int) -> Kept:
    return {g.name: list(range(g.size - (4 if g.kind == "ffn" else g.size // 2))) for g in graph.prunable}


def uneven(graph: DependencyGraph, times: int) -> Kept:
    """Something of most groups; the attention of one layer stays whole."""
    shuffled = random.Random(times)
    kept = {}
    for number, group in enumerate(graph.prunable):
        left = group.size - 1 - number if group.kind == "ffn" else max(1, group.size - number // 2)
        kept[group.name] = sorted(shuffled.sample(range(group.size), left))
    return kept


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("how", [even, uneven])
@pytest.mark.parametrize(
    "name", ["llama-gqa", "mistral", "phi3", "gpt2", "gemma2", "qwen3-moe", "mixtral", "falcon-new"]
)
def test_prune_and_prune_again_in_memory(name: str, how, tmp_path: Path) -> None:
    model = TINY[name]()
    for times in (1, 2):
        graph = protect_failing(model, trace(model))
        kept = how(graph, times)
        expected_before = shapes_of(model)
        slice_model(model, graph, kept)
        with pytest.raises(ModelError, match="other shapes"):
            check_describes_itself(model)
        expected, parameters = logits(model), list(model.parameters())
        before = adopt_config(model, graph, kept)
        check_describes_itself(model)
        assert torch.equal(logits(model), expected)
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        twin = before.build()
        assert shapes_of(twin) == expected_before
        assert logits(twin).isfinite().all()
        assert adopt_config(model, graph, kept).config is model.config, "the second time nothing happens"

        (tmp_path / f"proper{times}").mkdir()
        write(model, None, tmp_path / f"proper{times}", graph=graph, kept=kept)
        model.save_pretrained(tmp_path / f"plain{times}")
        for folder in (f"proper{times}", f"plain{times}"):
            again, _ = load(str(tmp_path / folder))
            assert (logits(again) - expected).abs().max() <= 1e-5
        made = model.generate(
            IDS, max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(made, again.generate(IDS, max_new_tokens=3, do_sample=False))


def test_a_model_that_nothing_was_cut_from_keeps_its_config() -> None:
    model = TINY["llama-gqa"]()
    config, graph = model.config, trace(model)
    check_describes_itself(model)
    assert adopt_config(model, graph, {}).config is config is model.config
    assert standard_form(model, graph, {}).config is config


def test_layers_that_become_even_again_have_their_plain_class_back(tmp_path: Path) -> None:
    model = TINY["llama-gqa"]()
    family = type(model)
    graph = trace(model)
    for kept in ({"layers.0.mlp": list(range(9))}, {"layers.1.mlp": list(range(9))}):
        slice_model(model, graph, kept)
        adopt_config(model, graph, kept)
        graph = trace(model)
    assert type(model) is family
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(again) - logits(model)).abs().max() <= 1e-5

"""Recipes that claim to be as in a paper take what the paper takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.config import load_recipe
from secateur.graph import trace
from secateur.planning import allocate, restrict
from secateur.types import Scores

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize("name", ["wanda-sp", "llm-pruner"])
def test_the_same_share_of_heads_and_of_channels_goes_in_every_layer(name: str) -> None:
    overrides = ["budget.protect_first=0", "budget.protect_last=0", "budget.ratio=0.3"]
    budget = load_recipe(RECIPES / f"{name}.yaml", overrides).budget
    config = LlamaConfig(hidden_size=64, num_attention_heads=16, num_key_value_heads=8, intermediate_size=160)
    config.vocab_size, config.num_hidden_layers = 64, 6
    graph = restrict(trace(LlamaForCausalLM(config)), budget)
    alike = {group.name: torch.ones(group.size) for group in graph.prunable}  # heads that all matter, and
    worthless = {group.name: torch.rand(group.size) ** 8 for group in graph.prunable if group.kind == "ffn"}
    removed = allocate(graph, Scores(alike | worthless), budget)
    shares = {group.name: len(removed.get(group.name, ())) / group.size for group in graph.prunable}
    for group in graph.prunable:
        for other in graph.prunable:
            assert abs(shares[group.name] - shares[other.name]) <= 1 / min(group.size, other.size)

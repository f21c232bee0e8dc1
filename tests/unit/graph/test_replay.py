"""The recorded operators on sliced parameters compute what they compute with the units masked."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from secateur.errors import ModelError
from secateur.graph import record, replay
from secateur.graph.axes import leaf
from secateur.testing.tiny import FFN, TINY, randomise
from secateur.types import NodeGroup


def some(group: NodeGroup, seed: int = 0) -> list[int]:
    units = random.Random(f"{group.name}{seed}").sample(range(group.size), max(1, group.size // 2))
    return sorted(units)


@pytest.mark.parametrize("name", TINY)
def test_each_group_of_a_layer_and_all_together(name: str) -> None:
    model = TINY[name]()
    trace = record(model)
    last = model.config.num_hidden_layers - 1
    choices = [{group.name: some(group)} for group in trace.graph.prunable if group.layer == last]
    choices.append({group.name: some(group, seed=1) for group in trace.graph.prunable})
    for kept in choices:
        replayed = replay(model, trace, kept)
        assert replayed.difference < 1e-4, kept.keys()
        assert replayed.effect > 1e-3, kept.keys()


@pytest.mark.parametrize("name", ["llama-gqa", "olmo2", "phi", "mixtral", "deepseek-v3", "gpt-oss"])
def test_protected_kinds_are_exact_when_re_normalised(name: str) -> None:
    model = TINY[name]()
    trace = record(model)
    asked = [group for group in trace.graph if group.kind in ("hidden", "expert")]
    assert asked
    for group in asked:
        kept = sorted(random.Random(1).sample(range(group.size), max(2, group.size // 2)))
        replayed = replay(model, trace, {group.name: kept})
        assert replayed.difference < 1e-4, group.name
        assert replayed.effect > 1e-3, group.name


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "phi3", "gpt2", "falcon-new", "mixtral"])
def test_with_adapters(name: str) -> None:
    model = get_peft_model(TINY[name](), LoraConfig(r=4, target_modules="all-linear"))
    randomise(model)
    trace = record(model)
    replayed = replay(model, trace, {group.name: some(group) for group in trace.graph.prunable})
    assert replayed.difference < 1e-4
    assert replayed.effect > 1e-3


def test_keeping_everything_changes_nothing() -> None:
    model = TINY["qwen3"]()
    trace = record(model)
    replayed = replay(model, trace, {group.name: range(group.size) for group in trace.graph.prunable})
    assert (replayed.difference, replayed.effect) == (0.0, 0.0)


def test_the_model_is_not_touched() -> None:
    model = TINY["gemma3"]()
    trace = record(model)
    kept = {group.name: some(group) for group in trace.graph.prunable}
    before = {path: value.clone() for path, value in model.state_dict().items()}
    replay(model, trace, kept)
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())


def test_a_missing_member_is_noticed() -> None:
    model = TINY["llama-gqa"]()
    trace = record(model)
    symbol = trace.table.used["model.layers.0.mlp.up_proj.weight"]
    symbol.axes = (leaf(FFN), symbol.axes[1])
    with pytest.raises(ModelError, match="do not fit"):
        replay(model, trace, {"layers.0.mlp": some(trace.graph["layers.0.mlp"])})


def test_a_misaligned_member_is_noticed() -> None:
    """Gate and up rows taken as interleaved instead of one after the other: nothing fails, but the numbers differ."""
    model = TINY["phi3"]()
    trace = record(model)
    symbol = trace.table.used["model.layers.0.mlp.gate_up_proj.weight"]
    symbol.axes = ((*trace.units["layers.0.mlp"], *leaf(2)), symbol.axes[1])
    assert replay(model, trace, {"layers.0.mlp": some(trace.graph["layers.0.mlp"])}).difference > 1e-2


def test_no_weights_no_replay() -> None:
    model = TINY["llama-gqa"]()
    trace = record(model)
    with pytest.raises(ModelError, match="meta device"):
        replay(model.to("meta"), trace, {})

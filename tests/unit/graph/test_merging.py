"""Axes of equal size are one only when the model says so; a group with a member too many or too few is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.graph import record, trace
from secateur.surgery.verify import checks
from secateur.testing.tiny import TINY, build, randomise
from secateur.types import Member


def square() -> LlamaForCausalLM:
    """Hidden size, feed-forward width, rows of queries and vocabulary are 48; heads and layers are 4."""
    sizes = {"hidden_size": 48, "intermediate_size": 48, "vocab_size": 48, "head_dim": 12, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    randomise(model)
    return model.eval()


def test_equal_sizes_are_not_one_group() -> None:
    graph = trace(square())
    assert [(group.name, group.size) for group in graph if group.kind in ("hidden", "vocab")] == [
        ("vocab", 48),
        ("hidden", 48),
    ]
    for layer in range(4):
        assert (graph[f"layers.{layer}.mlp"].size, graph[f"layers.{layer}.attention"].size) == (48, 4)
        assert len(graph[f"layers.{layer}.mlp"].members) == 3
        assert len(graph[f"layers.{layer}.attention"].members) == 4
    assert len(graph.prunable) == 8
    everything = checks(square(), 0.5)
    assert [check for check in everything if not check.ok] == []


def test_branches_of_equal_width_are_two_groups() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(48, 20) for _ in range(2))
            self.down = nn.ModuleList(nn.Linear(20, 48) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down[0](self.up[0](x).relu()) * self.down[1](self.up[1](x).relu())

    model = build("llama-gqa")
    model.model.layers[1].mlp = Layer()
    groups = [group for group in trace(model) if group.kind == "ffn" and group.layer == 1]
    assert [(group.size, group.protected) for group in groups] == [(20, None), (20, None)]
    assert not {m.parameter for m in groups[0].members} & {m.parameter for m in groups[1].members}


@pytest.mark.parametrize("name", TINY)
def test_layers_have_groups_of_their_own(name: str) -> None:
    graph = trace(TINY[name]())
    owners: dict[tuple[str, int, int], str] = {}
    for group in graph.prunable:
        for member in group.members:
            for row in member.rows(range(group.size)).flatten().tolist():
                assert owners.setdefault((member.parameter, member.axis, row), group.name) == group.name


@pytest.mark.parametrize(
    ("parameter", "axis"), [("model.layers.1.mlp.up_proj.weight", 0), ("model.layers.0.self_attn.q_proj.weight", 1)]
)
def test_a_member_too_many_is_seen(parameter: str, axis: int) -> None:
    """As if two axes of 48 had been taken for one: of another layer, or of the hidden size."""
    model = square()
    run = record(model)
    group = run.graph["layers.0.mlp"]
    merged = replace(group, members=(*group.members, Member(parameter, axis, "out", (0,), 1, 1)))
    graph = replace(run.graph, groups=tuple(merged if g.name == group.name else g for g in run.graph))
    found = {check.group: check for check in checks(model, 0.5, replace(run, graph=graph))}
    assert not found["layers.0.mlp"].ok
    assert found["layers.2.mlp"].ok


def test_a_group_that_changes_nothing_is_not_taken_for_verified() -> None:
    model = square()
    nn.init.zeros_(model.model.layers[2].self_attn.o_proj.weight)
    found = {check.group: check for check in checks(model, 0.5)}
    assert "no visible effect" in found["layers.2.attention"].message
    assert all(found[name].ok for name in ("layers.1.attention", "layers.2.mlp"))

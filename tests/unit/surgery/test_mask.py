"""Masking: the same function as the sliced model, and nothing left behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur.errors import ModelError, PlanError
from secateur.graph import trace
from secateur.surgery import masked, slice_model, zero_units
from secateur.testing.tiny import TINY
from secateur.types import DependencyGraph, Member, NodeGroup

IDS = torch.arange(3, 27).reshape(2, 12)
Case = tuple[nn.Module, DependencyGraph]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def halves(graph: DependencyGraph) -> dict[str, list[int]]:
    return {group.name: list(range(0, group.size, 2)) for group in graph.prunable}


def test_a_mask_shows_and_leaves_nothing_behind(case: Case) -> None:
    model, graph = case
    before, dense = state(model), logits(model)
    with masked(model, graph, halves(graph)):
        assert (logits(model) - dense).abs().max() > 1e-2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), dense)


def test_a_mask_is_taken_off_after_an_exception(llama: Case) -> None:
    model, graph = llama
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), masked(model, graph, halves(graph)):
        raise RuntimeError("stop")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_mask_of_nothing_is_the_identity(llama: Case) -> None:
    model, graph = llama
    dense = logits(model)
    with masked(model, graph, {group.name: list(range(group.size)) for group in graph.prunable}):
        assert torch.equal(logits(model), dense)


def test_removing_all_but_one_unit_leaves_that_units_contribution(llama: Case) -> None:
    model, graph = llama
    mlp, states = model.model.layers[0].mlp, torch.randn(1, 3, model.config.hidden_size)
    with torch.no_grad(), masked(model, graph, {"layers.0.mlp": [7]}):
        unit = nn.functional.silu(states @ mlp.gate_proj.weight[7]) * (states @ mlp.up_proj.weight[7])
        torch.testing.assert_close(mlp(states), unit[..., None] * mlp.down_proj.weight[:, 7])


def test_masks_nest_and_gradients_flow_under_them(llama: Case) -> None:
    model, graph = llama
    before = state(model)
    with masked(model, graph, {"layers.0.mlp": [0, 1, 2]}), masked(model, graph, {"layers.0.mlp": [2, 3]}):
        weight = model.model.layers[0].mlp.down_proj.weight
        assert weight.abs().sum(0).nonzero().flatten().tolist() == [2]
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [2]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_zeroed_units_can_be_removed_without_a_difference(case: Case) -> None:
    model, graph = case
    with masked(model, graph, halves(graph)):
        expected = logits(model)
    zero_units(model, graph, halves(graph))
    assert torch.equal(logits(model), expected)
    with masked(model, graph, halves(graph)):
        assert torch.equal(logits(model), expected)


def test_a_norm_over_the_axis_looks_at_the_survivors_only() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.down(self.norm(self.up(states)))

    model, states = Normed(), torch.randn(4, 5)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    names = ("up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight")
    members = tuple(
        Member(name, int(name == "down.weight"), "in" if name == "down.weight" else "out", (0,), 1, 1) for name in names
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    graph = DependencyGraph("normed", (NodeGroup("layers.0.mlp", "ffn", 8, members),), shapes)
    rows = torch.tensor([0, 2, 3, 7])
    up = nn.functional.linear(states, model.up.weight[rows], model.up.bias[rows])
    normed = nn.functional.layer_norm(up, (4,), model.norm.weight[rows], model.norm.bias[rows])
    expected = nn.functional.linear(normed, model.down.weight[:, rows], model.down.bias)
    dense = model(states)
    with masked(model, graph, {"layers.0.mlp": rows.tolist()}):
        torch.testing.assert_close(model(states), expected)
        model(states).sum().backward()
        assert model.norm.weight.grad.nonzero().flatten().tolist() == rows.tolist()
    assert torch.equal(model(states), dense)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.9.mlp": [0]}, "does not have"),
        ({"layers.0.mlp": []}, "at least one"),
        ({"layers.0.mlp": [1, 0]}, "ascending"),
        ({"layers.0.mlp": [0, 0]}, "without repeats"),
        ({"layers.0.mlp": [-1]}, "below 40"),
        ({"layers.0.mlp": [40]}, "below 40"),
        ({"hidden": [0]}, "protected: residual width"),
    ],
)
def test_an_illegal_choice_is_refused(llama: Case, kept: dict[str, list[int]], message: str) -> None:
    with pytest.raises(PlanError, match=message), masked(*llama, kept):
        pass


def test_groups_where_zeroing_is_not_removing_are_refused(llama: Case) -> None:
    model, graph = llama
    group = graph["layers.0.mlp"]
    experts = replace(graph, groups=(replace(group, kind="expert"),))
    with pytest.raises(ModelError, match="not the same as removing"):
        zero_units(model, experts, {group.name: [0]})
    with pytest.raises(ModelError, match="No weight of a router"), masked(model, experts, {group.name: [0]}):
        pass
    producers = tuple(member for member in group.members if member.role == "out")
    unused = replace(graph, groups=(replace(group, members=producers),))
    with pytest.raises(ModelError, match="consumes"), masked(model, unused, {group.name: [0]}):
        pass


def test_units_that_were_zeroed_can_be_sliced_also_where_a_norm_runs_over_them() -> None:
    model = TINY["olmo2"]()
    graph = trace(model)
    assert graph["layers.0.attention"].renormalised
    kept = {"layers.0.attention": [1], "layers.1.mlp": list(range(9))}
    small = copy.deepcopy(model)
    slice_model(small, graph, kept)
    zero_units(model, graph, kept)
    slice_model(model, graph, kept)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), small.parameters(), strict=True))

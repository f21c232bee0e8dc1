"""Slicing: small tensors, the same function as the mask, attributes and ties in order, all or nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.errors import ModelError, PlanError
from secateur.surgery import masked, slice_model
from secateur.types import DependencyGraph, Member

IDS = torch.arange(3, 27).reshape(2, 12)
Case = tuple[nn.Module, DependencyGraph]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def uneven(graph: DependencyGraph, seed: int = 0) -> dict[str, list[int]]:
    """Random units, another number in every group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.prunable:
        count = int(torch.randint(1, group.size, (), generator=generator))
        kept[group.name] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
    return kept


@pytest.mark.parametrize("seed", [0, 1])
def test_slice_equals_mask_with_uneven_layers(case: Case, seed: int) -> None:
    model, graph = case
    kept = uneven(graph, seed)
    with masked(model, graph, kept):
        expected = logits(model)
    slice_model(model, graph, kept)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == graph.parameter_count(kept)


def test_sizes_of_layers_follow_their_weights(case: Case) -> None:
    model, graph = case
    slice_model(model, graph, uneven(graph))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif type(module).__name__ == "Conv1D":
            assert (module.nx, module.nf) == tuple(module.weight.shape)
        elif hasattr(module, "base_layer"):
            base = module.base_layer
            stored = (base.nx, base.nf) if hasattr(base, "nf") else (base.in_features, base.out_features)
            assert (module.in_features, module.out_features) == stored


def test_a_plan_that_removes_nothing_changes_nothing(llama: Case) -> None:
    model, graph = llama
    dense, parameters = logits(model), list(model.parameters())
    slice_model(model, graph, {group.name: list(range(group.size)) for group in graph.prunable})
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(logits(model), dense)


def test_the_surviving_numbers_are_the_old_ones_with_their_dtype_and_training_flag(llama: Case) -> None:
    model, graph = llama
    model.to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    slice_model(model, graph, {"layers.0.mlp": [3, 5, 30], "layers.1.attention": [1]})
    old, new = before.model.layers, model.model.layers
    assert torch.equal(new[0].mlp.up_proj.weight, old[0].mlp.up_proj.weight[[3, 5, 30]])
    assert torch.equal(new[0].mlp.down_proj.weight, old[0].mlp.down_proj.weight[:, [3, 5, 30]])
    assert torch.equal(new[1].self_attn.q_proj.weight, old[1].self_attn.q_proj.weight[24:])
    assert torch.equal(new[1].self_attn.k_proj.weight, old[1].self_attn.k_proj.weight[12:])
    assert torch.equal(new[1].self_attn.o_proj.weight, old[1].self_attn.o_proj.weight[:, 24:])
    assert new[0].self_attn.q_proj.weight.shape == old[0].self_attn.q_proj.weight.shape
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not new[0].mlp.up_proj.weight.requires_grad
    assert new[0].mlp.down_proj.weight.requires_grad


def test_tied_parameters_stay_one(llama: Case) -> None:
    model, graph = llama
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    graph = replace(graph, groups=tuple(group for group in graph if group.name != "layers.1.mlp"), shapes=shapes)
    with masked(model, graph, {"layers.0.mlp": [1, 2]}):
        expected = logits(model)
    slice_model(model, graph, {"layers.0.mlp": [1, 2]})
    assert first.up_proj.weight is second.up_proj.weight
    assert second.up_proj.out_features == 2
    torch.testing.assert_close(logits(model), expected)


def test_both_axes_of_a_tensor_and_buffers_are_cut() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("shift", torch.randn(8))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.down(self.mix(self.up(states)) + self.shift)

    from secateur.types import NodeGroup

    def group(name: str, size: int, *members: tuple[str, int, str]) -> NodeGroup:
        parts = tuple(Member(path, axis, role, (0,), 1, 1) for path, axis, role in members)  # type: ignore[arg-type]
        return NodeGroup(name, "ffn", size, parts)

    model, states = Square(), torch.randn(4, 3)
    groups = (
        group("first", 6, ("up.weight", 0, "out"), ("up.bias", 0, "out"), ("mix.weight", 1, "in")),
        group(
            "second", 8, ("mix.weight", 0, "out"), ("mix.bias", 0, "out"), ("shift", 0, "out"), ("down.weight", 1, "in")
        ),
    )
    graph = DependencyGraph("square", groups, {name: tuple(p.shape) for name, p in model.named_parameters()})
    kept = {"first": [0, 5], "second": [1, 2, 6]}
    with masked(model, graph, kept):
        expected = model(states)
    slice_model(model, graph, kept)
    assert model.mix.weight.shape == (3, 2)
    assert model.shift.shape == (3,)
    assert "shift" in model.state_dict()
    torch.testing.assert_close(model(states), expected)


def test_the_meta_device_gives_the_same_shapes(llama: Case) -> None:
    model, graph = llama
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    kept = uneven(graph)
    slice_model(model, graph, kept)
    slice_model(empty, graph, kept)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_sliced_model_generates_with_and_without_cache(case: Case) -> None:
    model, graph = case
    slice_model(model, graph, uneven(graph))
    runs = [
        model.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*runs)


def test_training_goes_on_after_slicing(llama: Case) -> None:
    model, graph = llama
    model(input_ids=IDS, labels=IDS).loss.backward()
    slice_model(model, graph, uneven(graph))
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kept", [{"hidden": [0]}, {"layers.0.mlp": [0], "layers.1.mlp": [40]}, {"nowhere": [0]}])
def test_an_illegal_choice_leaves_the_model_whole(llama: Case, kept: dict[str, list[int]]) -> None:
    model, graph = llama
    parameters = list(model.parameters())
    with pytest.raises(PlanError):
        slice_model(model, graph, kept)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_stale_graph_is_refused(llama: Case) -> None:
    model, graph = llama
    slice_model(model, graph, {"layers.0.mlp": [0, 1]})
    with pytest.raises(PlanError, match="sliced already"):
        slice_model(model, graph, {"layers.0.mlp": [0, 1]})


def test_quantised_weights_are_refused(llama: Case) -> None:
    model, graph = llama
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        slice_model(model, graph, {"layers.0.mlp": [0, 1]})


def test_an_unknown_layer_of_torch_is_refused() -> None:
    from secateur.types import NodeGroup

    model = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 4, 1))
    members = (Member("0.weight", 0, "out", (0,), 1, 1), Member("1.weight", 1, "in", (0,), 1, 1))
    graph = DependencyGraph("conv", (NodeGroup("layers.0.mlp", "ffn", 6, members),), {})
    with pytest.raises(ModelError, match="Conv1d"):
        slice_model(model, graph, {"layers.0.mlp": [0]})

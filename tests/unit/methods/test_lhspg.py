"""LHSPG's maths against a slow reference, and the projection of a model with adapters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from secateur.graph import trace
from secateur.methods.lhspg import Decay, HalfSpace, Shrinking, decay_factor, half_space_factor
from secateur.surgery import masked, scales_with_zeros, slice_model, zero_units
from secateur.testing.tiny import TINY
from secateur.testing.zoo import Shape
from secateur.testing.zoo import build_type as build_any
from secateur.training import LoraSettings, attach_lora, merge_lora
from secateur.types import Cut

SHRINKING: dict[str, type[Shrinking]] = {"decay": Decay, "half-space": HalfSpace}


def test_decay_is_linear_and_ends_at_exact_zero() -> None:
    product = 1.0
    for step in range(7):
        product *= decay_factor(step, 7)
        assert product == pytest.approx((6 - step) / 7)
    assert product == 0.0


def _slow_half_space(x: list[float], update: list[float], shrink: float, epsilon: float) -> list[float]:
    """Algorithm 4, lines 7-9, for one unit, number by number."""
    norm = math.sqrt(sum(value * value for value in x))
    trial = [value + extra - shrink * value / norm for value, extra in zip(x, update, strict=True)]
    dot = sum(new * value for new, value in zip(trial, x, strict=True))
    return [0.0] * len(x) if dot < epsilon * norm**2 else trial


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
def test_half_space_step_agrees_with_the_paper_unit_by_unit(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(6, 13, generator=generator) for _ in range(2))
    update = 0.8 * update
    shrink = torch.linspace(0.0, 5.0, 6)
    factor, share = half_space_factor(x.square().sum(1), (x * update).sum(1), shrink, epsilon)
    result = factor[:, None] * x + share[:, None] * update
    zeroed = 0
    for unit in range(6):
        expected = _slow_half_space(x[unit].tolist(), update[unit].tolist(), float(shrink[unit]), epsilon)
        assert result[unit].tolist() == pytest.approx(expected, abs=1e-5)
        zeroed += not result[unit].any()
    assert 0 < zeroed < 6


def test_half_space_keeps_zero_units_at_zero() -> None:
    factor, share = half_space_factor(torch.zeros(2), torch.zeros(2), torch.ones(2), 0.0)
    assert not factor.any()
    assert not share.any()


def _adapted(name: str) -> Any:
    adapted = attach_lora(TINY[name](), LoraSettings(rank=3, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in adapted.named_parameters():
        if ".lora_B." in path:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


@pytest.mark.parametrize("mode", ["decay", "half-space"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "qwen2", "mixtral", "gpt-oss"])
def test_a_period_ends_with_exact_zeros_and_leaves_the_rest_alone(name: str, mode: Any) -> None:
    adapted = _adapted(name)
    graph = trace(adapted)
    redundant = {group.name: [0, group.size - 1][: max(1, group.size - 1)] for group in graph.prunable}
    before = {path: value.detach().clone() for path, value in adapted.named_parameters()}
    callback = SHRINKING[mode](graph, redundant, {}, steps=4)
    callback.begin(adapted)
    for step in range(4):
        callback.after_step(adapted, step)
    after = dict(adapted.named_parameters())
    for group in graph.prunable:
        others = [unit for unit in range(group.size) if unit not in redundant[group.name]]
        for member in group.members:
            weight, old = (x[member.parameter].movedim(member.axis, 0) for x in (after, before))
            if member.role == "out":
                assert not weight[member.rows(redundant[group.name])].any()
            if len(graph.of_parameter(member.parameter)) == 1:  # no other group's rows on the same tensor
                kept = member.rows(others).flatten()
                assert torch.equal(weight[kept], old[kept])


def test_the_first_decay_step_scales_the_effective_weight_and_absorbs_the_adapter() -> None:
    adapted = _adapted("llama-gqa")
    graph = trace(adapted)
    group = next(group for group in graph.prunable if group.kind == "ffn")
    merged_before = merge_lora(_adapted("llama-gqa")).state_dict()
    callback = Decay(graph, {group.name: [1]}, {}, steps=10)
    callback.begin(adapted)
    callback.after_step(adapted, 0)
    merged_after = merge_lora(adapted).state_dict()
    up = next(path for path in merged_before if path.endswith(f"{group.layer}.mlp.up_proj.weight"))
    torch.testing.assert_close(merged_after[up][1], 0.9 * merged_before[up][1])
    torch.testing.assert_close(merged_after[up][0], merged_before[up][0])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_adapters_on_stacked_experts_are_absorbed_too(name: str) -> None:
    adapted = _adapted(name)
    graph = trace(adapted)
    group = next(group for group in graph.prunable if group.kind == "ffn")
    before = merge_lora(_adapted(name)).state_dict()
    callback = Decay(graph, {group.name: [1]}, {}, steps=10)
    callback.begin(adapted)
    callback.after_step(adapted, 0)
    after = merge_lora(adapted).state_dict()
    plain = TINY[name]()
    for member in trace(plain)[group.name].members:
        if member.role == "out":
            new, old = (state[member.parameter].movedim(member.axis, 0) for state in (after, before))
            assert old[member.rows([1])].any()
            torch.testing.assert_close(new[member.rows([1])], 0.9 * old[member.rows([1])])
            torch.testing.assert_close(new[member.rows([0])], old[member.rows([0])])


def test_units_that_are_gone_do_not_grow_back() -> None:
    adapted = _adapted("llama-gqa")
    graph = trace(adapted)
    gone = {group.name: [0] for group in graph.prunable}
    callback = Decay(graph, {}, gone, steps=2)
    callback.begin(adapted)
    callback.after_step(adapted, 0)
    parameters = dict(adapted.named_parameters())
    rows = [(m, parameters[m.parameter]) for g in graph.prunable for m in g.members if ".lora_B" in m.parameter]
    assert rows
    for member, weight in rows:
        assert not weight[member.rows([0])].any()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-oss"])
def test_a_half_space_step_is_the_slow_one_on_the_merged_rows(name: str) -> None:
    adapted, steps, epsilon = _adapted(name), 5, 0.1
    graph = trace(adapted)
    group = next(group for group in graph.prunable if group.kind == "ffn")
    places = [member for member in group.members if member.role == "out" and ".lora_" not in member.parameter]

    def rows(model: Any, unit: int) -> list[float]:
        parameters = dict(model.named_parameters())
        parts = [parameters[m.parameter].detach().movedim(m.axis, 0)[m.rows([unit])].flatten() for m in places]
        return torch.cat(parts).tolist()

    plain = {unit: rows(adapted, unit) for unit in (0, 3)}
    merged = copy.deepcopy(adapted)
    merged.merge_adapter()
    update = {unit: [m - p for m, p in zip(rows(merged, unit), plain[unit], strict=True)] for unit in (0, 3)}
    callback = HalfSpace(graph, {group.name: [0, 3]}, {}, steps=steps, epsilon=epsilon)
    callback.begin(adapted)
    callback.after_step(adapted, 0)
    for unit, x in plain.items():
        shrink = math.sqrt(sum(value * value for value in x)) / steps
        assert rows(adapted, unit) == pytest.approx(_slow_half_space(x, update[unit], shrink, epsilon), abs=1e-5)


@pytest.mark.parametrize("name", ["bitnet", "minimax", "olmoe", "olmo3"])
def test_zeros_are_cut_out_of_every_norm_that_runs_over_units(name: str) -> None:
    """Norms of queries and keys, of what attention gives (MiniMax), and of FFN channels (BitNet)."""
    model = build_any(name, Shape())
    graph = trace(model)
    adapted = attach_lora(model, LoraSettings(rank=3), seed=0)
    for path, parameter in adapted.named_parameters():
        if ".lora_B." in path:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(path)))
    redundant = {group.name: list(range(0, group.size - 1, 3)) for group in graph.prunable if group.size > 1}
    callback = HalfSpace(trace(adapted), redundant, {}, steps=3, epsilon=0.0)
    callback.begin(adapted)
    for step in range(3):
        callback.after_step(adapted, step)
    small = merge_lora(adapted).eval()
    kept = Cut.removing(graph, redundant)
    zero_units(small, graph, kept)
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        zeroed = small(ids).logits
        with masked(small, graph, kept):
            torch.testing.assert_close(small(ids).logits, zeroed, atol=1e-5, rtol=0)
        slice_model(small, graph, kept)
        torch.testing.assert_close(small(ids).logits, zeroed, atol=1e-4, rtol=0)


def test_as_units_shrink_a_norm_over_all_heads_stays_one_over_those_that_are_left() -> None:
    """Half-way, with squares a quarter of what they were, the norm divides by what these count for."""
    adapted = attach_lora(TINY["olmo2"](), LoraSettings(rank=3, alpha=6), seed=0)
    graph = trace(adapted)
    callback = Decay(graph, {"layers.0.attention": [0]}, {}, steps=4)
    norm = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_norm")
    before = norm.weight.detach().clone()
    callback.begin(adapted)
    assert torch.equal(norm.weight, before)
    for step in range(2):
        callback.after_step(adapted, step)
    share = (24 + 24 * 0.5**2) / 48
    torch.testing.assert_close(norm.weight[24:], before[24:] * share**0.5)
    states = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    states[:, :24] *= 0.5
    expected = states * (states.square().sum(1, keepdim=True) / 30 + 1e-5).rsqrt()
    torch.testing.assert_close(norm(states)[:, 24:], (expected * before)[:, 24:])


def test_a_norm_follows_units_that_are_zero_before_the_period_ends() -> None:
    """Half-space projection with a large ε zeroes at once; the heads that stay must not grow meanwhile."""
    adapted = _adapted("olmo2")
    callback = HalfSpace(trace(adapted), {"layers.0.attention": [0]}, {}, steps=8, epsilon=0.9)
    norm = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_norm")
    before = norm.weight.detach().clone()
    callback.begin(adapted)
    for step in range(2):
        callback.after_step(adapted, step)
    assert not adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight[:24].any()
    torch.testing.assert_close(norm.weight[24:], before[24:] * 0.5**0.5)


def test_norms_that_zeros_cannot_leave_by_a_factor_are_told_from_those_that_they_can() -> None:
    rows = {"weight": torch.arange(0, 12, 2)}
    assert scales_with_zeros(torch.nn.RMSNorm(12), rows)
    assert not scales_with_zeros(torch.nn.LayerNorm(12, bias=False), rows)
    assert not scales_with_zeros(TINY["gemma"]().model.norm, {"weight": torch.arange(0, 48, 2)})  # 1 + weight

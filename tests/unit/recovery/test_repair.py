"""Repair: the function comes back where the kept units can carry it, and errors only fall where they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.recovery.repair import repair, ridge_refit
from secateur.surgery import slice_model
from secateur.testing.tiny import TINY
from secateur.walk import Calibration


def _blocks(seed: int = 0, count: int = 12) -> Calibration:
    ids = torch.randint(3, 97, (count, 12), generator=torch.Generator().manual_seed(seed))
    return Calibration(TokenBlocks(ids, ("noise",) * count))


def _logits(model: Any, seed: int = 9) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(_blocks(seed, 2).ids).logits
    return logits


def _with_redundant_units() -> tuple[Any, dict[str, list[int]]]:
    """A Llama in which FFN channels 10 to 15 are linear combinations of the others, and KV head 1 repeats head 0."""
    model = TINY["llama-gqa"]()
    kept: dict[str, list[int]] = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            mlp, attention = layer.mlp, layer.self_attn
            mlp.gate_proj.weight[:16] = mlp.gate_proj.weight[0]  # the same gate, so that the values combine linearly
            mixing = torch.randn(6, 10, generator=torch.Generator().manual_seed(number))
            mlp.up_proj.weight[10:16] = mixing @ mlp.up_proj.weight[:10]
            for name, rows in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
                weight = getattr(attention, name).weight
                weight[rows:] = weight[:rows]
            kept[f"layers.{number}.mlp"] = [*range(10), *range(16, 40)]
            kept[f"layers.{number}.attention"] = [0]
    return model, kept


def test_what_the_kept_units_can_carry_is_restored() -> None:
    model, kept = _with_redundant_units()
    graph, dense = trace(model), _logits(model)
    plain = copy.deepcopy(model)
    slice_model(plain, graph, kept)
    assert float((_logits(plain) - dense).abs().max()) > 0.1
    found = repair(model, graph, kept, _blocks(count=40), ridge=1e-10)
    slice_model(model, graph, kept)
    torch.testing.assert_close(_logits(model), dense, atol=1e-4, rtol=1e-4)
    assert len(found) == 4
    assert all(refit.before > 1e-3 and refit.after < 1e-6 for refit in found.values())


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "olmo2", "gemma2"])
def test_errors_fall_and_columns_of_units_that_go_stay(name: str) -> None:
    model = TINY[name]()
    graph, dense = trace(model), _logits(model)
    kept = {group.name: list(range(group.size - max(1, group.size // 4))) for group in graph.prunable}
    before = copy.deepcopy(model.state_dict())
    plain = copy.deepcopy(model)
    slice_model(plain, graph, kept)
    found = repair(model, graph, kept, _blocks(count=40))
    assert all(refit.after < refit.before for refit in found.values())
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        if key not in found:
            assert torch.equal(value, before[key]), key
    for key in found:
        [(group, member)] = [(g, m) for g, m in graph.of_parameter(key) if m.role == "in" and g.name in kept]
        gone = member.rows([unit for unit in range(group.size) if unit not in kept[group.name]]).flatten()
        now, was = (state[key].movedim(member.axis, 0)[gone] for state in (model.state_dict(), before))
        assert torch.equal(now, was)
    slice_model(model, graph, kept)
    assert float((_logits(model) - dense).square().mean()) < float((_logits(plain) - dense).square().mean())


def test_the_formula_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, dense = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    kept = torch.tensor([0, 2, 3, 7])
    now = dense[:, kept] + 0.1 * torch.randn(30, 4, generator=generator)
    new = ridge_refit(weight, kept, dense, now, 0.05)
    penalty = 0.05 * float(now.square().sum(0).mean())

    def cost(w: torch.Tensor) -> torch.Tensor:
        error = now.double() @ w.T - dense.double() @ weight.double().T
        return error.square().sum() + penalty * (w - weight[:, kept].double()).square().sum()

    w = new.clone().requires_grad_(True)
    [gradient] = torch.autograd.grad(cost(w), w)
    assert float(gradient.abs().max()) < 1e-6 * float(cost(w))
    assert torch.equal(ridge_refit(weight, kept, dense, torch.zeros(30, 4), 0.05), weight[:, kept].double())


def test_units_that_are_zero_already_need_no_repair() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 30:] = 0
    before = copy.deepcopy(model.state_dict())
    kept = {f"layers.{layer}.mlp": list(range(30)) for layer in range(2)}
    repair(model, graph, kept, _blocks())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-5, rtol=0)


def test_other_kinds_are_refused() -> None:
    model = TINY["qwen3-moe"]()
    graph = trace(model)
    experts = next(group for group in graph if group.kind == "expert")
    with pytest.raises(ModelError, match=r"recovery\.repair"):
        repair(model, graph, {experts.name: list(range(experts.size - 1))}, _blocks())

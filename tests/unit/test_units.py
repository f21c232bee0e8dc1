"""The rows of units through W + s B A: values, gradients, and what is written back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.testing.tiny import TINY, build
from secateur.training import LoraSettings, attach_lora
from secateur.types import Role
from secateur.units import base_members, effective_weight, lora_layer, rows_of, squared_norms, tensor_at

FAMILIES = ["llama-gqa", "gpt2", "mixtral"]
"""Linears, GPT-2's Conv1D, and stacked experts."""


def adapted(family: str) -> Any:
    model = attach_lora(build(family), LoraSettings(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B begins at zero, where nothing would be tested
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def dense_effective(model: Any, parameter: str) -> torch.Tensor:
    """``W + s B A`` as a whole, by peft itself, with gradients to A and B."""
    layer: Any = lora_layer(model, parameter)
    weight = tensor_at(model, parameter)
    return weight if layer is None else weight + layer.get_delta_weight("default")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


@pytest.mark.parametrize("role", ["out", "in"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_lasso_over_units_is_that_of_the_dense_formula(family: str, role: Role) -> None:
    model = adapted(family)
    for group in trace(model).prunable:
        units = list(range(0, group.size, 2))
        rows = rows_of(model, group, units, role)
        penalty = torch.cat([found.effective() for found in rows], dim=1).norm(dim=1).sum()

        squares = []
        for unit in units:
            pieces = [
                dense_effective(model, member.parameter).index_select(member.axis, member.rows([unit]).flatten())
                for member in base_members(group)
                if member.role == role
            ]
            squares.append(torch.stack([piece.square().sum() for piece in pieces]).sum())
        expected = torch.stack(squares).sqrt().sum()

        torch.testing.assert_close(penalty, expected)
        found, wanted = gradients(model, penalty), gradients(model, expected)
        assert found.keys() == wanted.keys() != set()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], msg=f"{group.name}: {name}")


@pytest.mark.parametrize("role", ["out", "in"])
@pytest.mark.parametrize("family", FAMILIES)
def test_absorbing_writes_the_scaled_sum_and_clears_the_adapter(family: str, role: Role) -> None:
    model = adapted(family)
    group = next(group for group in trace(model).prunable if group.kind == "ffn")
    units = [0, 2]
    factor, share = torch.tensor([0.5, 0.25]), torch.tensor([0.75, 1.0])
    for rows in rows_of(model, group, units, role):
        before = rows.read().float()
        added = rows.effective().detach() - before.reshape(len(units), -1)
        rows.absorb(before.clone(), factor, share)
        expected = before.reshape(len(units), -1) * factor[:, None] + added * share[:, None]
        torch.testing.assert_close(rows.read().reshape(len(units), -1), expected)
        torch.testing.assert_close(rows.effective().detach(), expected)
        rows.clear()
        assert not rows.effective().any()
        weight = effective_weight(model, rows.name).movedim(rows.axis, 0)
        assert not weight[rows.index].any()
        assert weight.any()


@pytest.mark.parametrize("role", ["out", "in"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inner_products_and_norms_by_unit(family: str, role: Role) -> None:
    model = adapted(family)
    group = next(group for group in trace(model).prunable if group.kind == "ffn")
    members = rows_of(model, group, [1, 3, 4], role)
    values = [rows.read().float() for rows in members]
    norms = torch.cat([value.reshape(3, -1) for value in values], dim=1).square().sum(1)
    torch.testing.assert_close(squared_norms(members, values), norms)
    for rows, value in zip(members, values, strict=True):
        flat = value.reshape(3, -1)
        torch.testing.assert_close(rows.along(value), ((rows.effective().detach() - flat) * flat).sum(1))


def test_what_is_not_one_plain_adapter_is_refused() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(TINY["llama-gqa"](), config)
    with pytest.raises(ModelError, match="DoRA"):
        rows_of(model, trace(model)["layers.0.mlp"], [0], "out")

"""Sums numbers per element or row of a parameter to numbers per unit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from secateur.types import DependencyGraph, Member, NodeGroup
from secateur.units.weights import is_adapter_parameter


def base_members(group: NodeGroup, trained: dict[str, nn.Parameter] | None = None) -> Iterator[Member]:
    """The members of ``group`` without those of adapters (they count through ``effective_weight``).

    With ``trained``, only members that are in it.
    """
    for member in group.members:
        if not is_adapter_parameter(member.parameter) and (trained is None or member.parameter in trained):
            yield member


def base_parameters(graph: DependencyGraph, group: NodeGroup) -> list[list[str]]:
    """The parameters in each unit of a group whose units are modules, without those of adapters."""
    return [[name for name in names if not is_adapter_parameter(name)] for names in graph.parameters_by_unit(group)]


def other_axes(tensor: torch.Tensor, axis: int) -> tuple[int, ...]:
    """All axes of ``tensor`` but ``axis``."""
    return tuple(index for index in range(tensor.dim()) if index != axis)


def sum_rows(values: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Sum a number per row of ``member``'s axis, shape ``[rows]``, to a number per unit, shape ``[size]``."""
    if member.in_order and len(values) == size * member.width:
        return values.reshape(size, -1).sum(dim=1)
    return values[member.rows(torch.arange(size)).to(values.device)].sum(dim=1)


def sum_units(elements: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Sum a number per element of ``member``'s parameter to a number per unit, fp32, shape ``[size]``."""
    elements = elements.float()
    axes = other_axes(elements, member.axis)
    return sum_rows(elements.sum(dim=axes) if axes else elements, member, size)

"""The rows of a plan's units in the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from secateur.errors import ModelError, PlanError
from secateur.types import Cut, DependencyGraph, Kept, Member, Role
from secateur.units import Rows, tensors_of


def removed_rows(model: nn.Module, graph: DependencyGraph, kept: Kept, role: Role | None = None) -> list[Rows]:
    """Rows of removed units, one entry for each (tensor, axis) touched; ``role`` restricts to such members.

    Their ``index`` is sorted and without repeats.

    Raises PlanError when ``graph`` is not the graph of ``model`` as it stands (another model, or already sliced).
    """
    tensors = tensors_of(model)
    found: dict[tuple[int, int], list[tuple[Member, torch.Tensor]]] = {}
    for group, units in Cut.keeping(graph, kept).groups:
        for member in group.members:
            tensor = _tensor(tensors, graph, member)
            if role is None or member.role == role:
                found.setdefault((id(tensor), member.axis), []).append((member, member.rows(units).flatten()))
    return [_merge(tensors, parts) for parts in found.values()]


def _merge(tensors: Mapping[str, torch.Tensor], parts: list[tuple[Member, torch.Tensor]]) -> Rows:
    member = parts[0][0]
    tensor = tensors[member.parameter]
    removed = torch.cat([rows for _, rows in parts]).unique()
    if removed[-1] >= tensor.shape[member.axis] or len(removed) == tensor.shape[member.axis]:
        raise PlanError(
            f"The graph gives {member.parameter} rows up to {int(removed[-1])}, of which {len(removed)} are removed, "
            f"but axis {member.axis} has {tensor.shape[member.axis]}. Trace the model again."
        )
    return Rows(member.parameter, tensor, member.axis, removed)


def _tensor(tensors: Mapping[str, torch.Tensor], graph: DependencyGraph, member: Member) -> torch.Tensor:
    tensor = tensors.get(member.parameter)
    if tensor is None:
        raise PlanError(f"The model has no tensor {member.parameter}, which its graph names. Trace the model again.")
    expected = graph.shapes.get(member.parameter)
    if expected is not None and tuple(tensor.shape) != tuple(expected):
        raise PlanError(
            f"{member.parameter} has shape {tuple(tensor.shape)}, its graph says {tuple(expected)}: the model was "
            "changed (sliced already?) since it was traced. Trace it again."
        )
    if not tensor.is_floating_point():
        raise ModelError(
            f"{member.parameter} is stored as {tensor.dtype}: quantised weights cannot be cut. Load the model in "
            "float32, bfloat16 or float16, and quantise the result."
        )
    return tensor

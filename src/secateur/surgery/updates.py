"""New values for parameters, with which a method compensates for removed units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.surgery.bias import bias_shape, give_biases
from secateur.types import Cut, DependencyGraph, Kept

Updates = Mapping[str, torch.Tensor]


def check_updates(model: nn.Module, graph: DependencyGraph, kept: Kept, updates: Updates) -> None:
    """Raise ModelError for updates that cannot be written, or whose new biases could not be cut by ``kept``."""
    new = _new_biases(model, updates)
    for group, _ in Cut.keeping(graph, kept).groups:
        for member in group.members:
            path = member.parameter.rpartition(".")[0]
            if member.role == "out" and path in new:
                raise ModelError(
                    f"{path} gets a new bias, and loses outputs with {group.name}; no graph has both. Protect "
                    f"{group.name} (budget.protect)."
                )


def apply_updates(model: nn.Module, updates: Updates) -> None:
    """Write new values into parameters, permanently.

    Args:
        model: the model before the cut.
        updates: path of a parameter → its new values, of its shape. A path that ends with ``.bias`` may be that of a
            linear without one: it gets a bias, and so do, with zeros, the linears of the same name in other layers.

    Raises ModelError, before anything is changed, for a path that is none of these, another shape, or values that are
    not finite.
    """
    give_biases(model, _new_biases(model, updates))
    _write(model, updates)


@contextmanager
def updated(model: nn.Module, updates: Updates) -> Iterator[None]:
    """A context in which parameters have the values of ``apply_updates``; they are restored afterwards."""
    new = _new_biases(model, updates)
    parameters = _parameters(model)
    before = {path: parameters[path].detach().clone() for path in updates if path in parameters}
    given = give_biases(model, new)
    try:
        _write(model, updates)
        yield
    finally:
        _write(model, before)
        for linear in given:
            linear.register_parameter("bias", None)


def _new_biases(model: nn.Module, updates: Updates) -> set[str]:
    """Paths of the linears that have no bias and get one; ModelError when some update cannot be written."""
    parameters, modules = _parameters(model), dict(model.named_modules())
    new = set()
    for path, value in updates.items():
        owner, _, leaf = path.rpartition(".")
        place = parameters.get(path)
        shape = bias_shape(modules.get(owner)) if place is None and leaf == "bias" else None
        if place is not None:
            shape = tuple(place.shape)
        elif shape is not None:
            new.add(owner)
        if shape is None or tuple(value.shape) != shape:
            there = f"has shape {shape}" if shape else "is neither a parameter nor the bias of a linear"
            raise ModelError(f"The method has new values of shape {tuple(value.shape)} for {path}, which {there}.")
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"The method has new values for {path} that are not finite. Compute in fp32.")
    return new


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def _write(model: nn.Module, values: Updates) -> None:
    parameters = _parameters(model)
    for path, value in values.items():
        parameters[path].copy_(value)

"""Whole decoder layers: skipping them, and removing them from the model.

A removed block is the identity on the residual stream: its input is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.errors import ModelError
from secateur.types import Cut, DependencyGraph, Kept, NodeGroup

OWN_INDEX = ("layer_idx", "layer_id", "layer_index", "block_idx")
"""Attributes by which a module knows which layer it is in: the cache counts by them."""
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")
"""Attributes with the number of layers, of modules around them and of configs."""


@contextmanager
def skipped(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which the removed layers pass on their inputs."""
    hooks = []
    try:
        for group, units in Cut.keeping(graph, kept).groups:
            for path in (group.modules[unit] for unit in units) if group.modules else ():
                hooks.append(model.get_submodule(path).register_forward_hook(_identity, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _identity(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
    if isinstance(output, torch.Tensor):
        return given
    if type(output) is tuple and isinstance(output[0], torch.Tensor):
        return (given, *output[1:])
    raise ModelError(
        f"A {type(module).__name__} returns a {type(output).__name__}, and cannot be skipped. Leave layer out of "
        "budget.kinds."
    )


def remove_layers(model: nn.Module, group: NodeGroup, kept: Sequence[int]) -> None:
    """Remove the layers that are not in ``kept`` from their list, and renumber the others."""
    path = group.modules[0].rpartition(".")[0]
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    for unit in reversed(range(group.size)):
        if unit not in kept:
            del layers[unit]
    for new, old in enumerate(kept):
        for module in layers[new].modules():
            for name in OWN_INDEX:
                if vars(module).get(name) == old:
                    setattr(module, name, new)
    parts = path.split(".")
    for depth in range(len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        for name in LAYER_COUNTS:
            if vars(around).get(name) == group.size:
                setattr(around, name, len(kept))


def without_layers(graph: DependencyGraph, kept: Kept) -> tuple[DependencyGraph, dict[str, list[int]]]:
    """The graph of the model after removing layers by ``kept``, and ``kept`` in its names."""
    cut = next(((group, kept[group.name]) for group, _ in Cut.keeping(graph, kept).groups if group.modules), None)
    if cut is None:
        return graph, {name: list(units) for name, units in kept.items()}
    layers, stays = cut
    path = layers.modules[0].rpartition(".")[0]
    numbers = {old: new for new, old in enumerate(stays)}

    def renamed(name: str) -> str | None:
        """A parameter's name; None for one in a layer that has gone."""
        if not name.startswith(f"{path}."):
            return name
        number, _, rest = name[len(path) + 1 :].partition(".")
        return f"{path}.{numbers[int(number)]}.{rest}" if int(number) in numbers else None

    groups: list[NodeGroup] = []
    names: dict[str, str] = {}
    for group in graph:
        if group.layer is not None and group.layer not in numbers:
            continue
        layer = None if group.layer is None else numbers[group.layer]
        name = group.name if layer is None else group.name.replace(f"layers.{group.layer}.", f"layers.{layer}.", 1)
        within = names.get(group.within, group.within) if group.within is not None else None
        members = tuple(
            replace(member, parameter=new) for member in group.members if (new := renamed(member.parameter)) is not None
        )
        modules, size, fixed = group.modules, group.size, group.fixed
        if modules:
            modules, size = modules[: len(stays)], len(stays)
            fixed = tuple((numbers[unit], reason) for unit, reason in fixed)
        names[group.name] = name
        groups.append(
            replace(
                group,
                name=name,
                layer=layer,
                members=members,
                modules=modules,
                size=size,
                fixed=fixed,
                within=within,
            )
        )
    shapes = {new: shape for name, shape in graph.shapes.items() if (new := renamed(name)) is not None}
    left = {names[name]: list(units) for name, units in kept.items() if name in names and name != layers.name}
    return replace(graph, groups=tuple(groups), shapes=shapes), left

"""Masks on the inputs of a group's consumers: they remove units while the model trains, with any kind of weights.

Unlike ``masked``, they write nothing into the weights. These may be quantised, or changed by an optimiser meanwhile. A
forward pre-hook multiplies the input of each consuming linear (``o_proj``, ``down_proj``; with its adapter, if any) by
zeros and ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import ModelError
from secateur.surgery.mask import require_maskable
from secateur.surgery.norms import is_norm, over_survivors
from secateur.types import Cut, DependencyGraph, Member


class InputMasks:
    """Removes units of a model by multiplication; a context manager that restores the model.

    Args:
        model: plain or with adapters, its linears quantised or not.
        graph: of that model before it was quantised.

    ``remove`` sets the removed units. A norm that runs over the units uses the kept ones only. Raises ModelError for a
    group with other consumers than linears, and PlanError for units that the graph does not have.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph) -> None:
        self.model, self.graph = model, graph
        self._modules = dict(model.named_modules())
        self._masks: dict[nn.Module, torch.Tensor] = {}
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._norms: list[nn.Module] = []

    def __enter__(self) -> InputMasks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove({})

    def remove(self, removed: Mapping[str, Iterable[int]]) -> None:
        """Set the removed units, in place of earlier ones: group name → unit indices."""
        kept = Cut.removing(self.graph, removed)
        self.graph.check_kept(kept)
        masks: dict[nn.Module, torch.Tensor] = {}
        norms: dict[nn.Module, dict[str, torch.Tensor]] = {}
        require_maskable(self.graph[name] for name in kept)
        for name in kept:
            group = self.graph[name]
            units = sorted(set(removed[name]))
            for member in group.members:
                if ".lora_" in member.parameter:
                    continue  # it sees the masked input of the linear that it belongs to
                if member.role == "in":
                    module, width = consumer_of(self._modules, self.graph, member)
                    mask = masks.setdefault(module, torch.ones(width))
                    mask[member.rows(units).flatten()] = 0.0
                else:
                    self._add_norm(norms, member, units)
        self._set(masks, norms)

    def _set(self, masks: dict[nn.Module, torch.Tensor], norms: Mapping[nn.Module, Mapping[str, torch.Tensor]]) -> None:
        for module in self._norms:
            del module.forward
        self._norms = list(norms)
        for module, names in norms.items():
            module.forward = over_survivors(module, names)
        for module in self._hooks.keys() - masks.keys():
            self._hooks.pop(module).remove()
        self._masks = masks
        for module in masks.keys() - self._hooks.keys():
            self._hooks[module] = module.register_forward_pre_hook(self._multiply)

    def _multiply(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0]
        mask = self._masks[module]
        if mask.device != states.device or mask.dtype != states.dtype:
            mask = self._masks[module] = mask.to(states.device, states.dtype)
        return (states * mask, *inputs[1:])

    def _add_norm(self, norms: dict[nn.Module, dict[str, torch.Tensor]], member: Member, removed: list[int]) -> None:
        path, _, name = member.parameter.rpartition(".")
        module = self._modules[path]
        if is_norm(module):
            stays = norms.setdefault(module, {}).get(name)
            width = self.graph.shapes[member.parameter][0]
            alive = torch.zeros(width, dtype=torch.bool)
            alive[torch.arange(width) if stays is None else stays] = True
            alive[member.rows(removed).flatten()] = False
            norms[module][name] = alive.nonzero().flatten()


def consumer_of(modules: Mapping[str, nn.Module], graph: DependencyGraph, member: Member) -> tuple[nn.Module, int]:
    """The module that multiplies with an ``in`` member, and the width of its input. Raises ModelError for other members
    than weights of linears.

    Args:
        modules: of the model, by path.
    """
    path, _, leaf = member.parameter.rpartition(".")
    module = modules.get(path.removesuffix(".base_layer"))
    shape = graph.shapes[member.parameter]
    if module is None or leaf != "weight" or len(shape) != 2:
        raise ModelError(
            f"{member.parameter} is not the weight of a linear, and its input cannot be masked in training. "
            "Protect its group (budget.protect), or choose a method that does not mask."
        )
    return module, shape[member.axis]

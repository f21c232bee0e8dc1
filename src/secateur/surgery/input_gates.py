"""Gates on the inputs of a group's consumers: one multiplier for each unit, with a gradient.

As ``InputMasks``, with numbers in place of zeros and ones. They work with any kind of weights, and ``folded`` writes
them into the consumer's columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.surgery.input_masks import consumer_of
from secateur.surgery.mask import require_maskable
from secateur.types import DependencyGraph
from secateur.units import Rows, effective_weight

Multipliers = Mapping[str, torch.Tensor]
"""Group name → a number for each unit, ``[units]``."""


class InputGates:
    """Multiplies the inputs of the consumers of some groups; a context manager that restores the model.

    Args:
        model: plain or with adapters, its linears quantised or not.
        graph: of that model before it was wrapped or quantised.
        names: the groups. Each needs multipliers in ``set``.

    Raises ModelError for a group with other consumers than linears.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, names: Iterable[str]) -> None:
        groups = [graph[name] for name in names]
        require_maskable(groups)
        modules = dict(model.named_modules())
        self._columns: dict[nn.Module, list[tuple[str, torch.Tensor]]] = {}
        """Consumer → its gated groups, with the columns of each unit."""
        self._order: dict[nn.Module, torch.Tensor] = {}
        """Consumer → for each column, its place when those of the gated groups come first."""
        self._wide: dict[nn.Module, torch.Tensor] = {}
        widths: dict[nn.Module, int] = {}
        for group in groups:
            for member in group.members:
                if member.role == "in":
                    module, widths[module] = consumer_of(modules, graph, member)
                    self._columns.setdefault(module, []).append((group.name, member.rows(range(group.size))))
        for module, parts in self._columns.items():
            gated = torch.cat([columns.flatten() for _, columns in parts])
            others = torch.ones(widths[module], dtype=torch.bool).index_fill_(0, gated, False).nonzero().flatten()
            self._order[module] = torch.cat([gated, others]).argsort()
        self._hooks = [module.register_forward_pre_hook(self._multiply) for module in self._columns]

    def __enter__(self) -> InputGates:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def set(self, multipliers: Multipliers | None) -> None:
        """The multipliers of all groups from now on, in place of earlier ones; None for those of the plain model, 1.

        They must stay until the backward pass has ended, which may compute activations once more.
        """
        self._wide = {}
        for module, parts in self._columns.items() if multipliers is not None else ():
            # no gather by unit: its gradient adds up in another order each time on a GPU
            wide = [
                multipliers[name].unsqueeze(1).expand(columns.shape).reshape(-1)  # type: ignore[index]
                for name, columns in parts
            ]
            ones = wide[0].new_ones(len(self._order[module]) - sum(map(len, wide)))
            self._wide[module] = torch.cat([*wide, ones])[self._order[module].to(ones.device)]

    def _multiply(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        wide = self._wide.get(module)
        return inputs if wide is None else (inputs[0] * wide.to(inputs[0].dtype), *inputs[1:])


@torch.no_grad()
def folded(model: nn.Module, graph: DependencyGraph, multipliers: Multipliers) -> dict[str, torch.Tensor]:
    """New values of the weights that consume the units: each unit's columns times its multiplier, adapters included.

    Exact for every consumer that is linear in its input. The model is not changed.

    Args:
        graph: of the plain model.

    Returns:
        Path in the plain model → values of the parameter's shape and type, for ``apply_updates``.
    """
    updates: dict[str, torch.Tensor] = {}
    for name, values in multipliers.items():
        for member in graph[name].members:
            if member.role == "in":
                path = member.parameter
                weight = updates[path] if path in updates else effective_weight(model, path).clone()
                columns = Rows(path, weight, member.axis, member.rows(range(graph[name].size)).flatten())
                factor = values.to(weight.device).float().repeat_interleave(member.rows_per_unit)
                columns.write(columns.read().float() * factor.view(-1, *[1] * (weight.dim() - 1)))
                updates[path] = weight
    return updates

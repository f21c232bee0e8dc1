"""Norms that run over the units of a group (OLMo2 normalises queries and keys over all heads together).

Removing units there also changes the norm: its statistics are those of the kept units afterwards. Units that are
*already* zero are different. They count in the divisor: an RMS norm over N rows, of which n are not zero, gives sqrt(N
/ n) times the result over these n alone. Removing such units changes nothing if the weights of the kept rows are
multiplied by that factor. Both cases follow here from the rows that count. (ε, which is added to the mean of the
squares, would grow by N / n as well, and no config could express that. A method that zeroes units lowers ε meanwhile
with ``set_epsilon``, and it has its old value when they are removed.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.types import Cut, DependencyGraph, Kept, NodeGroup
from secateur.units import tensors_of

MASKABLE = ("ffn", "attention", "query")
"""Kinds of groups whose units can be zeroed for good, one by one, while a model trains."""

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Names that norms have for ε."""
_DENSE_EPSILON = "dense_epsilon"
"""Where a norm keeps it while it is another."""


@dataclass(frozen=True)
class CutNorm:
    """A norm over an axis that loses rows."""

    kept: Mapping[str, torch.Tensor]
    """Name of each parameter → its kept rows."""
    counting: Mapping[str, torch.Tensor]
    """The same with the rows that are already zero: the rows of the statistics before the cut."""

    @property
    def factor(self) -> float:
        """Factor for the weights of the kept rows when the others are removed; 1 when none are zero."""
        kept, counting = (len(next(iter(rows.values()))) for rows in (self.kept, self.counting))
        return math.sqrt(counting / kept)


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def norms_over(model: nn.Module, graph: DependencyGraph, kept: Kept) -> dict[nn.Module, CutNorm]:
    """The norms that lose rows in a cut to ``kept``."""
    modules, tensors = dict(model.named_modules()), tensors_of(model)
    stays: dict[nn.Module, dict[str, torch.Tensor]] = {}
    counts: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for group, units in Cut.keeping(graph, kept).groups:
        places = [(*_split(modules, member.parameter), member) for member in group.members if member.role == "out"]
        norms = [(module, name, member) for module, name, member in places if is_norm(module)]
        if not norms:
            continue
        silent = silent_units(tensors, group, units) if group.kind in MASKABLE else []
        there = [unit for unit in units if unit not in set(silent)]
        for module, name, member in norms:
            width = tensors[member.parameter].shape[member.axis]
            for table, gone in ((stays, units), (counts, there)):
                alive = table.setdefault(module, {}).setdefault(name, torch.ones(width, dtype=torch.bool))
                if gone:
                    alive[member.rows(gone).flatten()] = False
    found = {}
    for module, masks in stays.items():
        rows, counting = ({name: m.nonzero().flatten() for name, m in t.items()} for t in (masks, counts[module]))
        norm = CutNorm(rows, counting)
        found[module] = norm if norm.factor == 1 or scales_with_zeros(module, rows) else CutNorm(rows, rows)
    return found


def _split(modules: Mapping[str, nn.Module], parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return modules[path], name


def silent_units(tensors: Mapping[str, torch.Tensor], group: NodeGroup, units: Sequence[int]) -> list[int]:
    """Those of ``units`` whose producing rows are all zero, the norm's included."""
    left = list(units)
    for member in sorted(group.members, key=lambda member: tensors[member.parameter].dim()):  # the smallest first
        tensor = tensors[member.parameter]
        if member.role == "out" and left:
            if tensor.is_meta:
                return []
            index = member.rows(left).to(tensor.device)
            alive = tensor.detach().movedim(member.axis, 0)[index].flatten(1).any(1).tolist()
            left = [unit for unit, lives in zip(left, alive, strict=True) if not lives]
    return left


def scales_with_zeros(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> bool:
    """Whether zero rows can be removed from this norm with a factor on its weights, as in an RMS norm; found by a test.

    Args:
        module: a norm over its last axis.
        kept: name of each of its parameters → its kept rows, not all of them.
    """
    weight = module._parameters.get("weight")
    if weight is None or "weight" not in kept:
        return False
    rows, width = kept["weight"].to(weight.device), len(weight)
    states = torch.zeros(1, width, dtype=weight.dtype, device=weight.device)
    states[:, rows] = 1 + torch.arange(len(rows), dtype=weight.dtype, device=weight.device) % 7
    scaled = copy.copy(module)
    scaled._parameters = dict(module._parameters)
    with torch.no_grad():
        ones = torch.ones_like(weight)
        scaled._parameters["weight"] = nn.Parameter(ones, requires_grad=False)
        whole = type(module).forward(scaled, states)
        ones *= math.sqrt(width / len(rows))
        small = over_survivors(scaled, kept)(states)
    tolerance = 10 * torch.finfo(weight.dtype).eps ** 0.5
    return torch.allclose(whole[:, rows], small[:, rows], rtol=tolerance, atol=0)


def set_epsilon(module: nn.Module, share: float) -> None:
    """Set ε of a norm to this share of its value in the dense model, until ``restore_epsilon``."""
    name = next((name for name in _EPSILONS if isinstance(vars(module).get(name), float)), None)
    if name is not None:
        dense = vars(module).setdefault(_DENSE_EPSILON, vars(module)[name])
        setattr(module, name, share * dense)


def restore_epsilon(module: nn.Module) -> None:
    """Undo ``set_epsilon``."""
    if _DENSE_EPSILON in vars(module):
        set_epsilon(module, 1.0)
        delattr(module, _DENSE_EPSILON)


def over_survivors(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward of a norm over the last axis that uses the kept entries only; the others become zero.

    Further inputs of the width of the first (the gate of a gated norm) are narrowed in the same way. Gradients reach
    the module's own parameters.
    """
    rows = next(iter(kept.values()))

    def forward(states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        index, width = rows.to(states.device), states.shape[-1]
        if any(getattr(module, name).shape != (width,) for name in kept):
            return type(module).forward(module, states, *others, **named)  # head by head: those that stay do not see it

        def narrow(value: Any) -> Any:
            wide = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == width
            return value.index_select(-1, index) if wide else value

        small = copy.copy(module)
        weights: dict[str, Any] = dict(module._parameters)
        weights.update((name, weights[name].index_select(0, index)) for name in kept)
        small._parameters = weights
        if isinstance(small, (nn.LayerNorm, nn.RMSNorm)):
            small.normalized_shape = (len(index),)
        if vars(small).get("group_size") == width:  # one group over all units (Mamba2's gated norm)
            vars(small)["group_size"] = len(index)
        inputs = [narrow(value) for value in (states, *others)]
        normed = type(module).forward(small, *inputs, **{name: narrow(value) for name, value in named.items()})
        return torch.zeros_like(states, dtype=normed.dtype).index_copy(-1, index, normed)

    return forward

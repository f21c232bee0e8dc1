"""How good the LoRA-guided estimate is: unit scores from it against those from the true gradient, side by side.

The true gradient of a wrapped weight is allocated here, one batch after the other: this is for studies, not for runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.importance.adapters import Composed, Options, composed
from secateur.importance.base import borrowed, calibration, mean_loss_backward
from secateur.importance.weights import base_members, dequantised, is_adapter_parameter, lora_layer, sum_rows
from secateur.planning import countable
from secateur.planning.stacks import comparable
from secateur.types import DependencyGraph, Member, NodeGroup

if TYPE_CHECKING:
    from secateur.data import TokenBlocks


ALL = "all"
"""Group and kind of the agreement between groups."""


@dataclass(frozen=True)
class Agreement:
    """Of one side of one group: Spearman's rank correlation of its units' scores with those by the true gradient.

    Or, with ``ALL`` as group and kind, of the output side of all units of the model in one ranking, as a global ranking
    compares them: not normalised, divided by the parameters that go with a unit.
    """

    group: str
    kind: str
    side: str
    """``out``, ``in``, or ``both`` added up as the criterion does; ``out for both``: the estimate of the output side
    alone against the truth of both, which says whether leaving the input side out makes a better criterion."""
    correlation: float
    overlap: float
    """Of the fifth of the units that the true gradient puts lowest, the fraction that the estimate puts there too."""


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors, ties by index; 1 for the same order, −1 for the opposite, NaN for one unit."""
    ranks = [values.argsort(stable=True).argsort(stable=True).double() for values in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norm) if norm > 0 else float("nan")


def compare_with_true_gradient(
    model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks, options: Options | None = None, batch_size: int = 4
) -> list[Agreement]:
    """Score every prunable group of a model with adapters by the estimate and by the true ``∂L/∂W``, and compare.

    Both see the same mean loss over ``blocks``, the same effective weight ``W + s B A`` and the same form and
    normalisation. The last agreement is that between groups, whatever ``options`` normalise. Memory: a gradient for
    every wrapped weight. The model is left as it was.
    """
    options = options or Options()
    blocks = calibration(blocks, "lora")
    adapters = [name for name, _ in model.named_parameters() if is_adapter_parameter(name)]
    frozen = {member.parameter for group in graph.prunable for member, _ in _members(model, group)}
    with borrowed(model, [*adapters, *frozen]) as trained:
        mean_loss_backward(model, blocks, batch_size)
        sums = {group.name: _unit_sums(group, _members(model, group), trained, options) for group in graph.prunable}
    found = [item for group in graph.prunable for item in _within(group, sums[group.name], options.normalise)]
    return found + _between(graph, sums)


def _members(model: nn.Module, group: NodeGroup) -> list[tuple[Member, Composed]]:
    layers = [(member, lora_layer(model, member.parameter)) for member in base_members(group)]
    return [(member, composed(layer)) for member, layer in layers if layer is not None]


UnitSums = list[tuple[str, torch.Tensor]]
"""For each matrix that a group lives on its side, and the estimate and the truth of the units, ``[2, size]``."""


def _unit_sums(
    group: NodeGroup,
    members: Sequence[tuple[Member, Composed]],
    trained: dict[str, nn.Parameter],
    options: Options,
) -> UnitSums:
    sums: UnitSums = []
    for member, operator in members:
        gradient = trained[member.parameter].grad
        assert gradient is not None
        guess = sum_rows(operator.row_sums(member.axis, options), member, group.size)
        truth = sum_rows(true_row_sums(operator, gradient, member.axis, options), member, group.size)
        sums.append((member.role, torch.stack([guess, truth]).cpu()))
    return sums


def _within(group: NodeGroup, sums: UnitSums, normalise: bool) -> list[Agreement]:
    """The agreements on one group, by side."""
    added: dict[str, torch.Tensor] = {}
    for role, scores in sums:
        norms = scores.norm(dim=1, keepdim=True)
        share = torch.where(norms > 0, scores / norms, 0.0) if normalise else scores
        for side in (role, "both"):
            added[side] = added.get(side, torch.zeros(2, group.size)) + share
    if "out" in added:
        added["out for both"] = torch.stack([added["out"][0], added["both"][1]])
    return [
        Agreement(group.name, group.kind, side, spearman(guess, truth), _overlap(guess, truth))
        for side, (guess, truth) in added.items()
    ]


def _between(graph: DependencyGraph, sums: Mapping[str, UnitSums]) -> list[Agreement]:
    """The agreement on all units; none where no matrix that produces units has an adapter."""
    plain, parts = countable(graph), []
    for group in graph.prunable:
        producing = [scores for side, scores in sums[group.name] if side == "out"]
        if producing:
            guess, truth = torch.stack(producing).sum(0)
            cost = plain.unit_cost(group)
            parts.append(torch.stack([comparable(scores, cost, "parameters") for scores in (guess, truth)]))
    if not parts:
        return []
    guess, truth = torch.cat(parts, dim=1)
    return [Agreement(ALL, ALL, "out", spearman(guess, truth), _overlap(guess, truth))]


def true_row_sums(operator: Composed, gradient: torch.Tensor, axis: int, options: Options) -> torch.Tensor:
    """``Composed.row_sums`` with the gradient itself instead of its estimate."""
    weight = dequantised(operator.base).float()
    delta = operator.scaling * (operator.b.detach().float() @ operator.a.detach().float())
    product = gradient.float() * (weight + (delta.T if operator.transposed else delta))
    value = product.abs() if options.form == "absolute" else product.square()
    return value.sum(1 - axis)


def _overlap(guess: torch.Tensor, truth: torch.Tensor) -> float:
    lowest = max(1, len(truth) // 5)
    chosen, right = (set(values.argsort(stable=True)[:lowest].tolist()) for values in (guess, truth))
    return len(chosen & right) / lowest

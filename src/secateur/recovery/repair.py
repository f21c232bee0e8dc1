"""Repair in closed form: after a cut, what consumes the kept units is refitted so that it gives what it gave before.

A consumer (the down projection of an FFN, the output projection of attention: role ``in`` in the graph) computed
``W X`` from all units' values X of the dense model; now it sees only the values X' of the kept ones, in a model that is
already cut before it. Ridge regression towards the weights that are there gives the new ones,

    W' = W_k + (W X X'ᵀ − W_k X' X'ᵀ) (X' X'ᵀ + λ I)⁻¹,

from one pass over calibration text, layer by layer, each on the repaired layers before it. No training, no new
parameters. (Reconstruction after pruning: SlimGPT, FLAP and others; see docs/methods/lorashear.md.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.progress import Bar
from secateur.surgery import masked
from secateur.surgery.mask import MASKABLE
from secateur.surgery.rows import removed_rows
from secateur.types import DependencyGraph, Kept
from secateur.units import Rows
from secateur.walk import Calibration, Inputs, LayerStack, Walker, borrowed, calibration_for, watched


@dataclass(frozen=True)
class Refit:
    """How far a consumer's output is from the dense model's, as a share of its square, on the calibration text."""

    before: float
    after: float


def ridge_refit(weight: torch.Tensor, kept: torch.Tensor, dense: torch.Tensor, now: torch.Tensor, ridge: float) -> Any:
    """New weights of the kept inputs of one matrix, by the formula above.

    Args:
        weight: W, ``[outputs, inputs]``, of all inputs.
        kept: indices of the inputs that stay, ``[k]``.
        dense: X, what all inputs were, ``[tokens, inputs]``.
        now: X', what the kept inputs are, ``[tokens, k]``, of the same tokens.
        ridge: λ as a share of the mean square of a kept input's values over all tokens.

    Returns:
        float64, ``[outputs, k]``.
    """
    dense, now, weight = dense.double(), now.double(), weight.double()
    there = weight[:, kept]
    gram = now.T @ now
    scale = float(gram.diagonal().mean())
    if scale <= 0:
        return there  # the kept inputs are silent on this text: nothing can be said
    missing = weight @ (dense.T @ now) - there @ gram
    gram.diagonal().add_(ridge * scale)
    return there + torch.linalg.solve(gram, missing.T, left=True).T


def repair(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Kept,
    calibration: Calibration | None,
    *,
    ridge: float = 0.01,
) -> dict[str, Refit]:
    """Refit in place what consumes the units of the groups in ``kept``; the model is whole still, and is cut after it.

    The columns of the units that go are left as they are. Stacked experts are not refitted. Costs about four forward
    passes over the text; memory for the hidden states of both models and the inputs of one layer's consumers.

    Args:
        model: the dense model.
        kept: as in ``PruningPlan.kept``.
        calibration: text; more tokens than a consumer has inputs, or the ridge decides.
        ridge: see ``ridge_refit``.

    Returns:
        Parameter → how far its output was and is from the dense one.

    Raises:
        ModelError: the layers are no plain stack (``LayerStack``), or units of another kind go.
    """
    text = calibration_for(calibration, "repair")
    cut = {name: units for name, units in kept.items() if len(units) < graph[name].size}
    stack = check_repairable(model, graph, cut)
    dense, pruned = Walker(stack, text), Walker(stack, text)
    found: dict[str, Refit] = {}
    with borrowed(model), torch.no_grad(), Bar("repairing", len(stack)) as bar:
        for layer in range(len(stack)):
            here = {name: units for name, units in cut.items() if graph[name].layer == layer}
            consumers = _consumers(model, graph, here)
            wanted = {name: Inputs() for name in consumers}
            with watched(model, wanted):
                dense.go_to(layer + 1)
            done: dict[str, Sequence[int]] = {}
            for name in sorted(consumers, key=lambda name: wanted[name].turn):
                now = Inputs()
                with masked(model, graph, done), watched(model, {name: now}):
                    pruned.through()
                found[name] = _refit(consumers[name], wanted[name].values, now.values, ridge)
                done |= {group: here[group] for group in here if _consumes(graph, group, name)}
            with masked(model, graph, here):
                pruned.go_to(layer + 1)
            bar.advance()
    return found


def check_repairable(model: nn.Module, graph: DependencyGraph, groups: Iterable[str]) -> LayerStack:
    """The layers, when cuts of these groups can be repaired; ModelError otherwise."""
    for name in groups:
        if graph[name].kind not in MASKABLE:
            raise ModelError(
                f"Repair refits what consumes units of kind {', '.join(MASKABLE)}; {name} is of kind "
                f"{graph[name].kind}. Leave it whole, or set recovery.repair=false."
            )
    try:
        stack = LayerStack.find(model, graph)
    except ModelError as error:
        raise ModelError(f"{error} Repair goes layer by layer; set recovery.repair=false.") from error
    for name in groups:
        if not stack.inside(graph[name]):
            raise ModelError(
                f"{name} does not lie in one layer, so that repair cannot refit it: recovery.repair=false."
            )
    return stack


def _consumers(model: nn.Module, graph: DependencyGraph, kept: Kept) -> dict[str, Rows]:
    """The matrices whose inputs go in part, by name."""
    rows = removed_rows(model, graph, kept, role="in")
    return {item.name: item for item in rows if item.tensor.dim() == 2 and item.name.endswith(".weight")}


def _consumes(graph: DependencyGraph, group: str, parameter: str) -> bool:
    return any(member.role == "in" and member.parameter == parameter for member in graph[group].members)


def _refit(rows: Rows, every: torch.Tensor, now: torch.Tensor, ridge: float) -> Refit:
    """Write the new weights of one consumer into it, from its inputs in the dense and in the cut model."""
    weight = rows.tensor.detach().movedim(rows.axis, -1)  # [outputs, inputs]
    kept = rows.others.to(weight.device)
    left = now[:, kept]
    new = ridge_refit(weight, kept, every, left, ridge).to(weight.dtype)
    wanted = every.float() @ weight.float().T
    size = float(wanted.square().sum())
    before, after = (float((left.float() @ w.float().T - wanted).square().sum()) for w in (weight[:, kept], new))
    rows.tensor.index_copy_(rows.axis, kept, new if rows.axis == 1 else new.T)
    return Refit(before / size, after / size) if size > 0 else Refit(0.0, 0.0)

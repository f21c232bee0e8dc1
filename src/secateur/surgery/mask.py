"""Masking: a model computes the same as the smaller model, without a change of shapes.

A unit is removed by zeroing the weights that consume it (the ``in`` members: columns of the output projection, and of
its LoRA A). This is exact for every axis that is consumed by contraction. Where a norm runs over the axis (OLMo2
normalises queries over all heads, every norm over the hidden width), its statistics are taken over the kept units, and
over units that are already zero (``norms``). Units that are chosen and not summed get -inf: experts (``unrouted``) and
tokens (``tokens``). Layers are skipped (``blocks``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from secateur.errors import ModelError
from secateur.surgery.blocks import skipped
from secateur.surgery.norms import MASKABLE, norms_over, over_survivors
from secateur.surgery.rows import removed_rows
from secateur.surgery.tokens import silenced
from secateur.surgery.unrouted import unrouted
from secateur.types import Cut, DependencyGraph, Kept, NodeGroup
from secateur.units import Rows, zeroed

_ZEROED = (*MASKABLE, "hidden", "state")
"""Kinds of groups whose units are removed exactly by zeroing their consumers, with norms over the kept units."""


@contextmanager
def masked(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which ``model`` computes the same as after ``slice_model(model, graph, kept)``, with its old shapes.

    Args:
        kept: group name → units that are kept, as in ``PruningPlan.kept``; a group that is not listed is kept whole.

    Weights are changed in place and restored bit for bit, also after an exception. Changes to rows of removed units
    (by an optimiser) are lost. Raises PlanError for an illegal ``kept``, and ModelError for groups without consumers.

    When the vocabulary is cut, logits keep their positions, with -inf for removed tokens.
    """
    graph.check_kept(kept)
    kept = Cut.keeping(graph, kept)
    contracted = {group.name: kept[group.name] for group, _ in kept.groups if group.kind in _ZEROED}
    with (
        zeroed(_consumers(model, graph, contracted)),
        _over_survivors(model, graph, contracted),
        unrouted(model, graph, kept),
        skipped(model, graph, kept),
        silenced(model, graph, kept),
    ):
        yield


@contextmanager
def _over_survivors(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which norms over the units take their statistics over the kept ones."""
    norms = norms_over(model, graph, kept)
    try:
        for module, norm in norms.items():
            module.forward = over_survivors(module, norm.counting)
        yield
    finally:
        for module in norms:
            del module.forward


@contextmanager
def unproduced(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which the weights that produce removed units are zero; this is not the same as removing them."""
    with zeroed(removed_rows(model, graph, kept, role="out")):
        yield


def zero_units(model: nn.Module, graph: DependencyGraph, kept: Kept) -> None:
    """Set the weights that consume the removed units to zero, permanently: a step of a progressive method.

    Removing these units afterwards changes nothing. There is one exception: a norm over the axis whose producers are
    not zero as well; its statistics are then those of the kept units. Raises ModelError for groups where zeroing is not
    the same as removing.
    """
    require_maskable(group for group, _ in Cut.keeping(graph, kept).groups)
    for rows in _consumers(model, graph, kept):
        rows.zero()


def _consumers(model: nn.Module, graph: DependencyGraph, kept: Kept) -> list[Rows]:
    """What to zero."""
    graph.check_kept(kept)
    for group, _ in Cut.keeping(graph, kept).groups:
        _require_consumers(group)
    return removed_rows(model, graph, kept, role="in")


def require_maskable(groups: Iterable[NodeGroup]) -> None:
    """Raise ModelError for a group whose units cannot be removed by zeroing while the model trains."""
    for group in groups:
        if group.kind not in MASKABLE:
            raise ModelError(
                f"{group.name} is a group of kind {group.kind}: setting its weights to zero is not the same as "
                f"removing them. Only groups of kind {', '.join(MASKABLE)} can be zeroed while a model trains. Cut "
                "this one with a one-shot method (magnitude, random, taylor)."
            )
        _require_consumers(group)


def _require_consumers(group: NodeGroup) -> None:
    if not any(member.role == "in" for member in group.members):
        raise ModelError(
            f"Nothing in the model consumes {group.name}, and it cannot be masked. Protect it (budget.protect)."
        )

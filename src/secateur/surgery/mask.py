"""Computing what a smaller model would compute, without changing a shape.

A unit is removed by zeroing what consumes it (the ``in`` members: columns of the output projection, and of its LoRA
A), which is exact for every axis that is consumed by contraction. Where a norm runs over the axis (OLMo2 normalises
queries over all heads; every norm does over the hidden width) its statistics are taken over the survivors, and over
units that are zero already (``norms``). What is chosen from instead of summed over gets -inf: experts (``unrouted``)
and tokens (``tokens``); layers are skipped (``blocks``).
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
"""Kinds of groups whose units are removed exactly by zeroing what consumes them, with norms over the survivors."""


@contextmanager
def masked(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """While it lasts, ``model`` computes what it would after ``slice_model(model, graph, kept)``; shapes stay.

    Args:
        kept: group name → units that stay, as in ``PruningPlan.kept``; a group that is not listed stays whole.

    Weights are changed in place and restored bit for bit, also after an exception; changes that are made meanwhile
    to rows of removed units (by an optimiser) are lost. Raises PlanError for an illegal ``kept``, and ModelError for
    groups that nothing consumes.

    Where the vocabulary is cut, logits keep their places, with -inf for tokens that are gone.
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
    """While it lasts, norms that run over the units take their statistics over those that stay."""
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
    """While it lasts, what produces the units that do not stay is zero: not the same as removing them."""
    with zeroed(removed_rows(model, graph, kept, role="out")):
        yield


def zero_units(model: nn.Module, graph: DependencyGraph, kept: Kept) -> None:
    """Set what consumes the units that do not stay to zero, for good: a step of a progressive method.

    Removing these units afterwards changes nothing, except where a norm runs over the axis and what produces them is
    not zero as well: its statistics will then be those of the survivors. Raises ModelError for groups where zeroing
    is not removing.
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
                f"removing them. Only groups of kind {', '.join(MASKABLE)} can be zeroed while a model trains; cut "
                "this one with a one-shot method (magnitude, random, taylor)."
            )
        _require_consumers(group)


def _require_consumers(group: NodeGroup) -> None:
    if not any(member.role == "in" for member in group.members):
        raise ModelError(f"Nothing in the model consumes {group.name}, so it cannot be masked. Leave it whole.")

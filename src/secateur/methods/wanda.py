"""Wanda-sp: weights times their input activations, in the structured form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from secateur import importance
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.progress import track
from secateur.surgery import masked
from secateur.types import Cut, NodeGroup, Scores, Settings
from secateur.walk import LayerStack, Walker, borrowed, calibration_for, watched


class WandaSettings(importance.WandaSP):
    """The source of the activations."""

    inputs: Literal["dense", "pruned"] = "dense"
    """``dense``: every layer gets its inputs from the dense model. ``pruned``: layers are pruned one after the other,
    and each gets its inputs from the pruned layers before it (as in FLAP's code; twice the time)."""


class Wanda(Method):
    """Wanda-sp, on the activations of the dense model or layer by layer."""

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = importance.WandaSP.paper
    summary: ClassVar[str] = f"one shot: {importance.WandaSP.summary}"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = WandaSettings
    settings: WandaSettings

    @property
    def ranks(self) -> bool:
        """See ``Method.ranks``."""
        return self.settings.inputs == "dense"

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``."""
        return TextRead(forward=1 if self.settings.inputs == "dense" else 3)

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        scores = task.score(self.settings)
        removed = task.allocate(scores)
        if self.settings.inputs == "dense":
            return Decision(removed, scores)
        return layer_by_layer(task, self.settings, {name: len(units) for name, units in removed.items()})


def layer_by_layer(task: PruningTask, criterion: importance.WandaSP, counts: Mapping[str, int]) -> Decision:
    """Remove the ``counts`` lowest units of each group, with every layer scored on the output of the pruned ones
    before.

    All groups of one layer are scored while that layer is whole. Raises ModelError for a model whose layers do not run
    one after the other, or for a group outside of them.
    """
    graph = task.restricted
    walker = Walker(LayerStack.find(task.model, graph), calibration_for(task.calibration, criterion.name))
    scores: dict[str, torch.Tensor] = {}
    removed: dict[str, list[int]] = {}
    with borrowed(task.model), ExitStack() as masks:
        for layer in track(range(len(walker.stack)), "layer by layer", len(walker.stack)):
            here = replace(graph, groups=tuple(group for group in graph if group.layer == layer))
            moments = criterion.moments(task.model, here)
            with watched(task.model, moments):
                walker.through()
            scores |= criterion.from_moments(task.model, here, moments).values
            gone = {
                group.name: sorted(_lowest(group, scores[group.name], counts[group.name]))
                for group in here.prunable
                if counts.get(group.name)
            }
            removed |= gone
            masks.enter_context(masked(task.model, task.graph, Cut.removing(task.graph, gone)))
            walker.go_to(layer + 1)
    return Decision(removed, Scores(scores))


def _lowest(group: NodeGroup, scores: torch.Tensor, count: int) -> list[int]:
    """The ``count`` lowest units, with equal numbers from each run of units."""
    return group.in_turn(scores.argsort(stable=True).tolist())[:count]

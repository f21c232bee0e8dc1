"""Wanda-sp: weights times the activations that they meet, in the structured form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from secateur import importance
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask
from secateur.progress import track
from secateur.surgery import masked
from secateur.types import Cut, NodeGroup, Scores, Settings
from secateur.walk import LayerStack, Walker, borrowed, calibration_for, watched


class WandaSettings(importance.WandaSP):
    """Which activations count."""

    inputs: Literal["dense", "pruned"] = "dense"
    """``dense``: every layer sees what the dense model gives it; ``pruned``: what the layers before it give when
    they are pruned already, one layer after the other (as in FLAP's code; twice the time)."""


class Wanda(Method):
    """Wanda-sp, on the activations of the dense model or layer by layer."""

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = importance.WandaSP.paper
    summary: ClassVar[str] = f"one shot: {importance.WandaSP.summary}"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = WandaSettings
    settings: WandaSettings

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        scores = task.score(self.settings)
        removed = task.allocate(scores)
        if self.settings.inputs == "dense":
            return Decision(removed, scores)
        return layer_by_layer(task, self.settings, {name: len(units) for name, units in removed.items()})


def layer_by_layer(task: PruningTask, criterion: importance.WandaSP, counts: Mapping[str, int]) -> Decision:
    """Take the ``counts`` lowest units of each group, every layer scored on what the pruned ones before it hand on.

    All groups of one layer see that layer while it is whole. Raises ModelError for a model whose layers do not run one
    after the other, or for a group outside of them.
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
    """The ``count`` lowest units; equally many of each run, where a group has several."""
    return group.in_turn(scores.argsort(stable=True).tolist())[:count]

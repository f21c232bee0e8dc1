"""Wanda-sp: weights times the activations that they meet, in the structured form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from secateur import importance
from secateur.importance.stack import LayerStack
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, one_shot
from secateur.precision import autocast
from secateur.progress import track
from secateur.surgery import masked
from secateur.types import NodeGroup, Scores, Settings, removed_to_kept


class WandaSettings(Settings):
    """Which activations count, and how the calibration text is run through the model."""

    inputs: Literal["dense", "pruned"] = "dense"
    """``dense``: every layer sees what the dense model gives it; ``pruned``: what the layers before it give when
    they are pruned already, one layer after the other (as in FLAP's code; twice the time)."""
    batch_size: int = Field(default=4, ge=1)
    """Windows in one forward pass; changes memory, not the result."""


class Wanda(Method):
    """Wanda-sp, on the activations of the dense model or layer by layer."""

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    summary: ClassVar[str] = "one shot: weights times the size of the activations that they meet (Wanda-sp)"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = WandaSettings
    settings: WandaSettings

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        criterion = importance.Activation(batch_size=self.settings.batch_size)
        decision = one_shot(task, criterion)
        if self.settings.inputs == "dense":
            return decision
        counts = {name: len(units) for name, units in decision.removed.items()}
        with autocast(task.training.precision, task.model.device):
            return layer_by_layer(task, criterion, counts)


def layer_by_layer(task: PruningTask, criterion: importance.Activation, counts: Mapping[str, int]) -> Decision:
    """Take the ``counts`` lowest units of each group, every layer scored on what the pruned ones before it hand on.

    All groups of one layer see that layer while it is whole. Raises ModelError for a model whose layers do not run one
    after the other, or for a group outside of them.
    """
    assert task.calibration is not None
    graph = task.restricted
    stack = LayerStack.find(task.model, graph)
    batches = list(task.calibration.batches(criterion.batch_size))
    states: list[torch.Tensor | None] = [None] * len(batches)
    scores: dict[str, torch.Tensor] = {}
    removed: dict[str, list[int]] = {}
    with ExitStack() as masks:
        for layer in track(range(len(stack)), "layer by layer", len(stack)):
            here = replace(graph, groups=tuple(group for group in graph if group.layer == layer))
            run = partial(_run, stack, batches, states, layer)
            scores |= criterion.score_during(task.model, here, run).values
            gone = {
                group.name: sorted(_lowest(group, scores[group.name], counts[group.name]))
                for group in here.prunable
                if counts.get(group.name)
            }
            removed |= gone
            masks.enter_context(masked(task.model, task.graph, removed_to_kept(task.graph, gone)))
            states = run()
    return Decision(removed, Scores(scores))


def _lowest(group: NodeGroup, scores: torch.Tensor, count: int) -> list[int]:
    """The ``count`` lowest units; equally many of each run, where a group has several."""
    return group.in_turn(scores.argsort(stable=True).tolist())[:count]


def _run(
    stack: LayerStack, batches: Sequence[torch.Tensor], states: Sequence[torch.Tensor | None], layer: int
) -> list[torch.Tensor | None]:
    """What comes out of ``layer`` for each batch."""
    return [stack.states(ids, layer, before, layer + 1) for ids, before in zip(batches, states, strict=True)]

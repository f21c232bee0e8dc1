"""Check windows: new weights are kept only if the loss falls on text that they were not made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.surgery import masked, updated
from secateur.surgery.mask import MASKABLE
from secateur.token_loss import LogitReader
from secateur.types import Cut, DependencyGraph
from secateur.walk import Calibration, LayerStack, calibration_for

Target = Literal["dense", "stream", "own"]
"""The target output of a part of the pruned model. ``dense``: its output in the dense model; ``stream``: the output
with which the residual stream after it equals the dense model's; ``own``: the output of the dense weights for the
pruned model's inputs."""

EVERY = 5
"""One window in this many is a check window."""
SKIPPED = 4
"""Positions at the beginning of a window that are left out: attention sinks have activations a hundred times as large
as all other tokens."""
_STEPS = (1.0, 0.5)
"""Fractions of all changes together, tried in turn on the loss of the check windows."""


@dataclass(frozen=True)
class Guarded:
    """New values, not yet written, with their effect on the loss."""

    updates: dict[str, torch.Tensor]
    """Path of a parameter → its new values, of the shape before the cut."""
    step: float = 0.0
    """Fraction of all changes that is in ``updates``; 0 when no fraction lowered the loss."""
    loss_before: float = float("nan")
    """Mean loss of the pruned model on the check windows, nats."""
    loss_after: float = float("nan")

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON has it."""
        return {"step": self.step, "loss_before": self.loss_before, "loss_after": self.loss_after}


def guarded(
    model: nn.Module,
    graph: DependencyGraph,
    cut: Cut,
    text: Calibration,
    new: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
) -> Guarded:
    """The largest fraction of all changes that lowers the loss on the check windows; none when neither does.

    Args:
        model: the dense model.
        new: path of a parameter → its new values, of the shape before the cut.
        start: the same for the pruned model before the changes, where its values differ from the dense ones.
    """
    check = text.rows(range(EVERY - 1, len(text), EVERY))
    reader = check.reader(model)
    with torch.no_grad(), updated(model, start), masked(model, graph, cut):
        before = _loss(reader, check)
    parameters = dict(model.named_parameters())
    for step in _STEPS if new else ():
        updates = {}
        for name, values in new.items():
            old = (start[name] if name in start else parameters[name]).detach()
            updates[name] = old.to(values.device, values.dtype).lerp(values, step)
        with torch.no_grad(), updated(model, {**start, **updates}), masked(model, graph, cut):
            loss = _loss(reader, check)
        if loss < before:
            return Guarded(updates, step, before, loss)
    return Guarded({}, 0.0, before, before)


def text_for(calibration: Calibration | None, key: str, advice: str | None = None) -> Calibration:
    """``calibration``, with enough windows to leave out those for checking.

    Args:
        key: the key of the recipe that asks for it, or the name of the method.
        advice: a sentence on what to do about too little text; None to switch ``key`` off.

    Raises:
        DataError: there is no text.
        ModelError: it has fewer than ``EVERY`` windows.
    """
    text = calibration_for(calibration, key)
    if len(text) < EVERY:
        raise ModelError(
            f"{key} needs at least {EVERY} windows, of which one is for checking, and the text has {len(text)}. "
            + (advice or f"Give more calibration tokens, or set {key}=false.")
        )
    return text


def check_inside(model: nn.Module, graph: DependencyGraph, kept: Iterable[str], key: str) -> LayerStack:
    """The layers. Raises ModelError unless all these groups are within layers that run one after the other.

    ``key`` is the key of the recipe that asks for it, such as ``recovery.repair``.
    """
    kept = list(kept)
    for name in kept:
        if graph[name].kind not in MASKABLE:
            raise ModelError(
                f"{key} compensates for units of kind {', '.join(MASKABLE)}; {name} is of kind {graph[name].kind}. "
                f"Protect it (budget.protect), or set {key}=false."
            )
    try:
        stack = LayerStack.find(model, graph)
    except ModelError as error:
        raise ModelError(f"{error} {key} runs the model layer by layer. Set {key}=false.") from error
    for name in kept:
        if not stack.inside(graph[name]):
            raise ModelError(f"{name} is not inside one layer, and {key} cannot compensate for it. Set {key}=false.")
    return stack


def _loss(reader: LogitReader, text: Calibration) -> float:
    """Mean next-token loss of all windows."""
    total = 0.0

    def add(rows: slice, here: slice, logits: torch.Tensor) -> None:
        nonlocal total
        targets = text.ids[rows, here.start + 1 : here.stop + 1].to(logits.device)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))

    text.read(reader, add)
    return total / (text.ids.numel() - len(text))

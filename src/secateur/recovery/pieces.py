"""A loss of logits with its gradient, without the logits of a whole window, for any loss that is a sum over positions.

``token_loss`` does this for cross-entropy outside of the Trainer. Here the loss has a graph, as the Trainer needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.token_loss import Split, pieces, split_model

_LOGITS = 1 << 23
"""Logits in one piece: 34 MB in fp32, 170 positions of a vocabulary of 49,152."""


@dataclass(frozen=True)
class Reading:
    """One forward pass of a model over a micro-batch, up to its head."""

    states: torch.Tensor
    """``[n, window, hidden]``; the logits ``[n, window, vocabulary]`` where the model cannot be split."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    """States of some positions → their logits."""
    weights: tuple[nn.Parameter, ...]
    """The parameters of the head that train."""
    vocabulary: int
    layers: tuple[torch.Tensor, ...]
    """The residual stream before each layer and at the end, ``[n, window, hidden]``; empty unless asked for."""

    def pieces(self) -> Iterator[slice]:
        """The positions that have a next token, in pieces."""
        batch, window = self.states.shape[:2]
        return pieces(batch, window, self.vocabulary, _LOGITS)


class Reader:
    """Reads micro-batches with one model. Whether it can be split is tried on the first tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._split: Split | None = None
        self._tried = False

    def read(self, ids: torch.Tensor, layers: bool = False) -> Reading:
        """One forward pass over ``ids`` ([n, window]), on the model's device; with ``layers``, the stream is kept."""
        if not self._tried:
            self._split, self._tried = self._halves(ids), True
        options = {"output_hidden_states": True} if layers else {}
        split = self._split
        if split is None:
            output = self.model(input_ids=ids, use_cache=False, **options)
            logits: torch.Tensor = output.logits
            return Reading(logits, lambda piece: piece, (), logits.shape[-1], _layers(output))
        output = split.states(ids, **options)
        bare = replace(output, hidden_states=None) if layers else output
        return Reading(
            output.last_hidden_state,
            lambda piece: split.logits(ids, bare, piece),
            _head_weights(split),
            split.vocabulary,
            _layers(output) if layers else (),
        )

    def _halves(self, ids: torch.Tensor) -> Split | None:
        """Dropout would make the trial fail, and is off meanwhile."""
        training = self.model.training
        try:
            return split_model(self.model.eval(), ids)
        finally:
            self.model.train(training)


def _layers(output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(output, "hidden_states", None) or ())


def _head_weights(split: Split) -> tuple[nn.Parameter, ...]:
    model: Any = split.model
    inside = {id(parameter) for parameter in split.backbone.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    found = {id(p): p for p in [*outside, *model.get_output_embeddings().parameters()] if p.requires_grad}
    return tuple(found.values())


def summed(reading: Reading, loss: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """The sum of ``loss`` over all pieces of a reading. Gradients flow to the states and to the head.

    Args:
        loss: logits ``[n, positions, vocabulary]`` and the positions → a scalar.
    """
    total: torch.Tensor = _Summed.apply(reading, loss, reading.states, *reading.weights)
    return total


class _Summed(torch.autograd.Function):
    """The gradients are computed piece by piece in the forward pass, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, loss: Any, states: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(states)
        of_weights = [torch.zeros_like(weight) for weight in weights]
        total = torch.zeros((), device=states.device)
        for here in reading.pieces():
            with torch.enable_grad():
                piece = states[:, here].detach().contiguous().requires_grad_()
                value = loss(reading.logits(piece), here)
                found = torch.autograd.grad(value, [piece, *weights], allow_unused=True)
            total += value.detach()
            gradient[:, here] = found[0]
            for one, more in zip(of_weights, found[1:], strict=True):
                if more is not None:
                    one += more
        ctx.save_for_backward(gradient, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return None, None, *[outer[0] * gradient for gradient in ctx.saved_tensors]

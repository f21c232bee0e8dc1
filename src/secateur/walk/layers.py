"""Calibration text on its way through the layers: the one walker."""

from __future__ import annotations

import torch

from secateur.walk.calibration import Calibration
from secateur.walk.stack import LayerStack


class Walker:
    """Hidden states of all windows at the input of one layer. They only move forwards.

    Memory: the hidden states of one layer, ``[windows, window, hidden]``.
    """

    def __init__(self, stack: LayerStack, calibration: Calibration) -> None:
        self.stack, self.calibration = stack, calibration
        self.layer = 0
        """The layer that runs next."""
        self.states: list[torch.Tensor] = []
        """Its inputs: one tensor ``[n, window, hidden]`` for each batch; none before layer 0."""

    def through(self, stop: int | None = None) -> list[torch.Tensor]:
        """Hidden states at the input of layer ``stop`` (the next one by default), with the layers as they are now.

        One tensor for each batch. The walker does not move.
        """
        return [self.batch(number, stop) for number in range(self.calibration.passes)]

    def batch(self, number: int, stop: int | None = None) -> torch.Tensor:
        """As ``through``, for one batch."""
        rows = slice(number * self.calibration.batch_size, (number + 1) * self.calibration.batch_size)
        states = self.states[number] if self.layer > 0 else None
        with torch.no_grad(), self.calibration.autocast(self.stack.model):
            return self.stack.states(
                self.calibration.ids[rows], self.layer, states, self.layer + 1 if stop is None else stop
            )

    def go_to(self, layer: int) -> None:
        """Move to the input of ``layer``. If the walker is already there, nothing happens."""
        if layer > self.layer:
            self.states, self.layer = self.through(layer), layer

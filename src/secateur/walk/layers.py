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
        """What goes into it: one tensor ``[n, window, hidden]`` a batch; none before layer 0."""

    def through(self, stop: int | None = None) -> list[torch.Tensor]:
        """Hidden states at the input of layer ``stop`` (the next one by default), with the layers as they are now.

        One tensor a batch. The walker stays where it is.
        """
        stop = self.layer + 1 if stop is None else stop
        moved = []
        for number, ids in enumerate(self.calibration.batches()):
            states = self.states[number] if self.layer > 0 else None
            with self.calibration.autocast(self.stack.model):
                moved.append(self.stack.states(ids, self.layer, states, stop))
        return moved

    def go_to(self, layer: int) -> None:
        """Move on to the input of ``layer``; nothing happens when the walker is there already."""
        if layer > self.layer:
            self.states, self.layer = self.through(layer), layer

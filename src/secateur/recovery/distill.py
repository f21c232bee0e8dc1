"""Recovery with a teacher: the small model learns the dense model's predictions as well as the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import ModelError
from secateur.evaluation import divergence, with_remainder
from secateur.token_loss import LogitReader, Reading, summed

_EVERY = 4
"""Every fourth layer is compared."""


@dataclass(frozen=True)
class Predicted:
    """The dense model's predictions at some positions."""

    log_p: torch.Tensor
    """Log-probabilities of the next token, ``[n, positions, vocabulary]``, float32; of ``tokens`` and all others, where
    these are given."""
    tokens: torch.Tensor | None = None
    """``[n, positions, k]``; ``log_p`` is then ``[n, positions, k + 1]``, and its last value is for all others."""


@dataclass(frozen=True)
class Predictions:
    """The dense model's predictions for a micro-batch."""

    at: Callable[[slice], Predicted]
    """Positions → predictions there."""
    layers: tuple[torch.Tensor, ...] = ()
    """As in ``Reading``."""
    pieces: tuple[slice, ...] = ()
    """Positions to ask for at a time."""


class Teacher(Protocol):
    """Predicts what the dense model predicts."""

    def read(self, ids: torch.Tensor, layers: bool = False) -> Predictions:
        """The predictions for windows ``ids`` ([n, window]), with the residual stream if ``layers``."""


class LiveTeacher:
    """The dense model in memory beside the small one (about the same size). It reads every window as well.

    With a teacher 25 % larger, a training step takes about 1.4 times as long. No gradient flows through it.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        """``autocast``: the type of its matrix products; None for that of its weights. The model goes to eval mode."""
        self._model, self._autocast = model.eval(), autocast
        self._reader: LogitReader | None = None
        self.device = next(model.parameters()).device

    def read(self, ids: torch.Tensor, layers: bool = False) -> Predictions:
        """One forward pass over ``ids`` ([n, window])."""
        with torch.no_grad(), self._cast():
            self._reader = self._reader or LogitReader(self._model, ids)
            reading = self._reader.start(ids, layers)
        return Predictions(lambda here: self._predicted(reading, here), reading.layers, tuple(reading.pieces()))

    def _predicted(self, reading: Reading, here: slice) -> Predicted:
        with torch.no_grad(), self._cast():
            return Predicted(reading.at(here).float().log_softmax(-1))

    def _cast(self) -> torch.autocast:
        dtype = self._autocast
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class Distillation:
    """The loss of recovery with a teacher, as ``training.Loss``.

    ``(1 − a) · cross-entropy + a · KL(p || m)``, mean over the predicted tokens, at temperature 1, where p are the
    teacher's and q the student's probabilities, and ``m = skew · p + (1 − skew) · q`` (skew KL, DistiLLM, arXiv
    2402.03898, equation 2; skew 0 is KL). In the first ``hidden_steps`` steps also ``hidden_weight`` times the mean of
    ``‖h − h_dense‖² / ‖h_dense‖²`` over the positions of every fourth layer's output and the last one.
    """

    def __init__(
        self,
        teacher: Teacher,
        weight: float,
        *,
        skew: float = 0.0,
        hidden_weight: float = 0.0,
        hidden_steps: int = 0,
    ) -> None:
        """``weight``: a, between 0 (no teacher) and 1 (the teacher alone)."""
        self.teacher, self.weight, self.skew = teacher, weight, skew
        self.hidden_weight, self.hidden_steps = hidden_weight, hidden_steps
        self._student: LogitReader | None = None

    def __call__(self, model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        """Mean loss of one micro-batch ``ids`` ([n, window]) in one step, from 0."""
        if self._student is None or self._student.model is not model:
            self._student = LogitReader(model, ids)
        layers = self.hidden_weight > 0 and step < self.hidden_steps
        student, wanted = self._student.start(ids, layers), self.teacher.read(ids, layers)

        def piece(logits: torch.Tensor, here: slice) -> torch.Tensor:
            targets = ids[:, here.start + 1 : here.stop + 1]
            return self._piece(logits.float().log_softmax(-1), wanted.at(here), targets)

        loss = summed(student, piece) / ids[:, 1:].numel()
        return loss + self.hidden_weight * hidden_error(student.layers, wanted.layers) if layers else loss

    def _piece(self, log_q: torch.Tensor, wanted: Predicted, targets: torch.Tensor) -> torch.Tensor:
        """Summed loss of some positions, from ``[n, positions, vocabulary]`` and targets ``[n, positions]``."""
        loss = log_q.new_zeros(())
        if self.weight > 0:
            own = log_q if wanted.tokens is None else with_remainder(log_q.gather(-1, wanted.tokens))
            loss = loss + self.weight * divergence(wanted.log_p, own, self.skew)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * F.nll_loss(log_q.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss


def hidden_error(student: tuple[torch.Tensor, ...], dense: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean of ``‖h − h_dense‖² / ‖h_dense‖²`` over positions and compared layers.

    The quotient is taken at each position, because attention sinks have norms a thousand times as large as others.

    Args:
        student: its residual stream before each layer and at the end, ``[n, window, hidden]`` each.
        dense: that of the dense model.

    Raises:
        ModelError: the streams do not have the same number of layers and the same width.
    """
    if not student or [x.shape for x in student] != [x.shape for x in dense]:
        raise ModelError(
            "The hidden states of the small model and of the dense model cannot be compared: their numbers or widths "
            "differ. Set recovery.hidden_weight=0."
        )
    compared = sorted({*range(_EVERY, len(dense), _EVERY), len(dense) - 1})
    errors = []
    for layer in compared:
        h, wanted = student[layer].float(), dense[layer].float()
        scale = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((h - wanted).square().sum(-1) / scale).mean())
    return torch.stack(errors).mean()

"""Calibration text, and the one loop that runs it through a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from pydantic import Field
from torch import nn

from secateur.data import TextSettings, TokenBlocks
from secateur.errors import DataError
from secateur.precision import Precision, autocast
from secateur.progress import track
from secateur.token_loss import LogitReader, TokenLoss, Use, use_at
from secateur.walk.borrow import input_device


class CalibrationSettings(TextSettings):
    """The text for measuring importance, and how it is run through the model."""

    tokens: int = Field(default=49_152, ge=2)
    """Tokens in all, in whole windows. If the text has less, but at least 8 windows, all of it is used. The scores of
    half as much text differ visibly from sample to sample."""
    batch_size: int = Field(default=4, ge=1)
    """Windows per pass. It changes memory, not the result. A criterion of single windows always runs one."""
    precision: Precision = "auto"
    """``bf16``: autocast over fp32 weights; ``auto``: bf16 where the processor supports it; or ``fp32``."""

    def of(self, blocks: TokenBlocks | None) -> Calibration | None:
        """``blocks`` with these settings; None for None."""
        return None if blocks is None else Calibration(blocks, self.batch_size, self.precision)


@dataclass(frozen=True)
class Calibration:
    """Windows of text, and how they are run. Every loop over calibration text is a method of this class."""

    blocks: TokenBlocks
    batch_size: int = 4
    """Windows per pass."""
    precision: Precision = "fp32"
    """Precision of the matrix products in a pass. Statistics and gradients have the types of the weights."""

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def ids(self) -> torch.Tensor:
        """int64, ``[windows, window]``, on the CPU."""
        return self.blocks.ids

    def rows(self, rows: Sequence[int]) -> Calibration:
        """The windows with these numbers, in this order."""
        return replace(self, blocks=self.blocks.rows(rows))

    def turn_rows(self, number: int, windows: int | None) -> list[int]:
        """Numbers of the windows of turn ``number`` (from 0 on) when each turn reads the next ``windows``, and the
        first follows the last. All windows for None, or when there are no more than that."""
        if windows is None or windows >= len(self):
            return list(range(len(self)))
        return [(number * windows + index) % len(self) for index in range(windows)]

    def turn(self, number: int, windows: int | None) -> Calibration:
        """The windows of ``turn_rows``."""
        rows = self.turn_rows(number, windows)
        return self if len(rows) == len(self) else self.rows(rows)

    @property
    def passes(self) -> int:
        """How many batches there are."""
        return -(-len(self) // self.batch_size)

    def batches(self) -> Iterator[torch.Tensor]:
        """The ids in order, at most ``batch_size`` windows at a time."""
        return self.blocks.batches(self.batch_size)

    def autocast(self, model: nn.Module) -> torch.autocast:
        """The context of one pass. Every pass needs a new one: autocast may keep copies of weights, and weights
        change."""
        return autocast(self.precision, input_device(model))

    def reader(self, model: nn.Module) -> LogitReader:
        """The reader of ``model`` for ``read`` and ``run``. It tries the model, before there are hooks."""
        return LogitReader(model, self.ids[:1].to(input_device(model)))

    def read(self, reader: LogitReader, use: Use) -> None:
        """``LogitReader.read`` for all windows: never more logits in memory than those of a piece, or of a window where
        the model cannot be split. The windows that ``use`` receives are numbers of this text."""
        first = 0
        for ids in self.batches():
            with self.autocast(reader.model):
                reader.read(ids.to(input_device(reader.model)), partial(use_at, use, first))
            first += len(ids)

    def run(self, reader: LogitReader, description: str) -> None:
        """``LogitReader.run`` for all windows, for collectors of statistics (``watched``, hooks)."""
        for ids in track(self.batches(), description, self.passes):
            with self.autocast(reader.model):
                reader.run(ids.to(input_device(reader.model)))

    def backward(self, model: nn.Module) -> float:
        """Accumulate in ``.grad`` the gradient of the mean loss over all windows; return that loss."""
        with self.autocast(model):
            return mean_loss_backward(model, self.blocks, self.batch_size)

    def window_gradients(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Yield once for every window, with the gradient of its own mean loss in ``.grad`` of the parameters.

        Use the gradients before the next step: the next window replaces them. Afterwards the parameters have none.
        """
        parameters = list(parameters)
        device = input_device(model)
        loss = TokenLoss(model, self.ids.to(device))
        for ids in track(self.blocks.batches(1), "gradients", len(self)):
            with self.autocast(model), torch.enable_grad():
                loss.backward(ids.to(device))
            yield
            for parameter in parameters:
                parameter.grad = None


def calibration_for(calibration: Calibration | None, reader: str) -> Calibration:
    """``calibration``. Raises DataError when there is no text; ``reader`` names the criterion, such as ``taylor``."""
    if calibration is None or len(calibration) == 0:
        raise DataError(
            f"'{reader}' reads text and got none. Give calibration text (calibration.text) and a tokenizer, or choose "
            "a method that needs no text, such as magnitude."
        )
    return calibration


def mean_loss_backward(model: nn.Module, blocks: TokenBlocks, batch_size: int) -> float:
    """Accumulate in ``.grad`` the gradient of the mean next-token loss over all of ``blocks``; return that loss.

    Every window has the same weight, for any batch size. Only the activations of one batch, and the logits of a few of
    its positions, are in memory at a time.
    """
    device = input_device(model)
    loss = TokenLoss(model, blocks.ids.to(device))
    total = 0.0
    with torch.enable_grad():
        for ids in blocks.batches(batch_size):
            total += loss.backward(ids.to(device), len(ids) / len(blocks))
    return total

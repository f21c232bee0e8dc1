"""The dense model's predictions on disk: its k likeliest tokens at each position, and the mass of all others.

They are computed once, before the cut. The dense model then need not stay in memory, and reading a window again costs
nothing.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from secateur import progress
from secateur.errors import ModelError, out_of_memory
from secateur.evaluation import with_remainder
from secateur.recovery.distill import LiveTeacher, Predicted, Predictions
from secateur.whole import whole

_WINDOWS = 16
"""Windows in one file: 25 MB for 512 tokens of 512 positions."""


def cache_bytes(windows: int, window: int, k: int) -> int:
    """Bytes of the cache for so many windows: log-probabilities in 16 bits, tokens in 32."""
    return windows * (window - 1) * (2 * (k + 1) + 4 * k)


class CachedTeacher:
    """A teacher that is read from files. ``KL`` is then over k tokens and the bucket of all others."""

    def __init__(self, ids: torch.Tensor, folder: Path) -> None:
        """``ids``: the windows in the cache, ``[windows, window]``; ``folder``: its files, 16 windows in each."""
        self._place = {_key(row): place for place, row in enumerate(ids)}
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def make(
        cls,
        model: nn.Module,
        ids: torch.Tensor,
        k: int,
        *,
        folder: Path | None,
        batch: int,
        autocast: torch.dtype | None = None,
    ) -> CachedTeacher:
        """Let ``model`` read all windows and keep its predictions.

        Args:
            ids: different windows, ``[windows, window]``, int64.
            k: tokens to keep at each position, at most the vocabulary.
            folder: for the files; whole ones of an interrupted run are kept. None: a temporary folder, which is removed
                with the teacher.
            batch: windows in a forward pass.
            autocast: the type of matrix products; None for that of the weights.
        """
        temporary = None
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="secateur-teacher-")
            folder = Path(temporary.name)
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(ids, folder)
        made._temporary = temporary
        training = model.training
        teacher = LiveTeacher(model, autocast)
        parts = ids.split(_WINDOWS)
        try:
            for number, part in enumerate(progress.track(parts, "reading with the dense model", len(parts))):
                path, digest = made._file(number), _digest(part, k)
                if not _holds(path, digest):
                    with whole(path) as scratch:
                        save_file(_likeliest(teacher, part, k, batch), scratch, metadata={"digest": digest})
        finally:
            model.train(training)
        return made

    def read(self, ids: torch.Tensor, layers: bool = False) -> Predictions:
        """The predictions for windows ``ids`` ([n, window]). Raises ModelError for a window that is not kept."""
        if layers:
            raise ModelError("A cached teacher has no hidden states. Set recovery.teacher_cache=0 or hidden_weight=0.")
        found = [self._window(row) for row in ids.cpu()]
        log_p, tokens = (torch.stack(values).to(ids.device) for values in zip(*found, strict=True))
        return Predictions(lambda here: Predicted(log_p[:, here].float(), tokens[:, here].long()))

    def _window(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = self._place.get(_key(row))
        if place is None:
            raise ModelError("Recovery reads a window that the dense model has not read. Start the run again.")
        number, inside = divmod(place, _WINDOWS)
        with safe_open(self._file(number), framework="pt") as file:
            return file.get_slice("log_p")[inside], file.get_slice("tokens")[inside]

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


def _likeliest(teacher: LiveTeacher, ids: torch.Tensor, k: int, batch: int) -> dict[str, torch.Tensor]:
    """``tokens`` [windows, window − 1, k] and ``log_p`` [windows, window − 1, k + 1], the last for all others."""
    log_p, tokens = [], []
    for few in ids.split(batch):
        wanted = teacher.read(few.to(teacher.device))
        kept = [_top(wanted.at(here).log_p, k) for here in wanted.pieces]
        log_p.append(torch.cat([one for one, _ in kept], dim=1))
        tokens.append(torch.cat([one for _, one in kept], dim=1))
    return {"log_p": torch.cat(log_p), "tokens": torch.cat(tokens)}


def _top(log_p: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return with_remainder(top).half().cpu(), tokens.int().cpu()


def _holds(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("digest") == digest
    except SafetensorError as error:
        if out_of_memory(error):
            raise
        return False


def _digest(ids: torch.Tensor, k: int) -> str:
    return hashlib.sha256(repr((tuple(ids.shape), k)).encode() + ids.numpy().tobytes()).hexdigest()


def _key(row: torch.Tensor) -> bytes:
    return row.numpy().tobytes()

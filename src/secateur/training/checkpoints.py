"""The state of callbacks is saved with each checkpoint of the Trainer, and restored by ``--resume``.

A checkpoint is the Trainer's own folder (adapters, optimiser, schedule, random states, position in the data) with one
more file, ``callbacks.safetensors``. It is written last, and contains the digests of the other files. A checkpoint is
complete only if it has this file, and all digests agree.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from secateur.errors import out_of_memory
from secateur.progress import say
from secateur.whole import remove, store_file, whole

_STATE = "callbacks.safetensors"


class StatefulCallback(TrainerCallback):
    """A callback whose own state (scores, moving averages, masks, rows of frozen weights) is part of a checkpoint."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state that a run needs to resume from here, by name."""
        raise NotImplementedError

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state from ``state_tensors``; called before training resumes."""
        raise NotImplementedError


class SaveStates(TrainerCallback):
    """Completes each checkpoint of the Trainer with the states of the callbacks."""

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self.callbacks = [callback for callback in callbacks if isinstance(callback, StatefulCallback)]

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer after it has written its files."""
        tensors = {
            f"{index}/{name}": tensor.detach().cpu().contiguous()
            for index, callback in enumerate(self.callbacks)
            for name, tensor in callback.state_tensors().items()
        }
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in _others(folder):
            store_file(path)
        with whole(folder / _STATE) as scratch:
            save_file(tensors, scratch, metadata={"step": str(state.global_step), **_digests(folder)})

    def restore(self, checkpoint: Path) -> None:
        """Give every callback the state that it had at this checkpoint."""
        tensors = load_file(checkpoint / _STATE)
        for index, callback in enumerate(self.callbacks):
            prefix = f"{index}/"
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            callback.load_state_tensors(own)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint in ``folder``, or None. Incomplete ones of a kill or a power cut are removed."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(found, reverse=True):
        if _is_complete(found[step]):
            return found[step]
        say(f"  {found[step]} is incomplete. Training resumes from an earlier point.")
        remove(found[step])
    return None


def _is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / _STATE).is_file():
        return False
    try:
        with safe_open(checkpoint / _STATE, framework="pt") as file:
            noted = dict(file.metadata() or {})
    except SafetensorError as error:
        if out_of_memory(error):
            raise
        return False
    noted.pop("step", None)
    return noted == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of the Trainer, by name."""
    found = {}
    for path in _others(checkpoint):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _others(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file() and _STATE not in path.name)

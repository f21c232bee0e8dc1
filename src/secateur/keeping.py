"""Files from which an interrupted run goes on: written atomically, and made again when they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError, out_of_memory
from secateur.progress import say
from secateur.whole import whole

T = TypeVar("T")


def keep(path: Path | None, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file ``path``, under a temporary name at first; None keeps nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as scratch:
            write(scratch)


def take(path: Path | None, read: Callable[[Path], T]) -> T | None:
    """The result of ``read`` for a kept file; None when it is missing, or damaged, with a message.

    A lack of memory is raised.
    """
    if path is None or not path.exists():
        return None
    try:
        return read(path)
    except (SecateurError, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        if out_of_memory(error):
            raise
        say(f"  {path} is damaged. Its content is computed again.")
        return None


def keep_tensors(path: Path | None, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """``keep`` tensors of any device by name, and beside them whatever JSON can hold."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    keep(path, lambda scratch: save_file(here, scratch, metadata={"facts": json.dumps(facts)}))


def take_tensors(path: Path | None) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors of ``keep_tensors``, on the processor, and the facts; None as ``take``."""

    def read(file: Path) -> tuple[dict[str, Tensor], Any]:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
            return tensors, json.loads(stored.metadata()["facts"])

    return take(path, read)

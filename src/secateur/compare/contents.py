"""Digests of the files that a comparison reads, because the same name may have other contents later."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Sequence
from pathlib import Path

from secateur.config import Recipe
from secateur.errors import InputError
from secateur.inputs import task_files

_PIECES = 64
_PIECE = 1 << 16
"""Samples read from a file of weights, and bytes of each. Training changes the whole file, and it may be large."""
_WEIGHTS = (".safetensors", ".bin")
_MODEL_FILES = (*_WEIGHTS, ".json", ".model", ".jinja", ".py")


def digests(recipe: Recipe, tasks: Sequence[str]) -> dict[str, str]:
    """Local file, task or model folder, as it is named → the first 16 digits of a SHA-256 of its content.

    Text sources that come with a package or from the hub, tasks of the harness, and models by a hub id or a built-in
    name are left out. Of weights, size and samples are read. Raises InputError for a file that cannot be read.
    """
    texts = (recipe.calibration.text, recipe.recovery.text, recipe.recovery.instructions, recipe.evaluation.text)
    wanted = {name: [_path(name)] for names in texts for name in names if _path(name).is_file()}
    wanted |= {name: sorted(task_files(_path(name))) for name in tasks if _path(name).exists()}
    analysis = recipe.budget.protect_from
    if analysis is not None and analysis.expanduser().is_file():
        wanted[str(analysis)] = [analysis.expanduser()]
    model = _path(recipe.model.name)
    if model.is_dir():
        wanted[recipe.model.name] = sorted(path for path in model.iterdir() if path.suffix in _MODEL_FILES)
    try:
        return {name: _digest(paths) for name, paths in wanted.items()}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _path(name: str) -> Path:
    return Path(name).expanduser()


def same_file(one: str, other: str) -> bool:
    """Whether two names of text stand for the same file, or for files with the same content."""
    paths = _path(one), _path(other)
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = size // _PIECES if path.suffix in _WEIGHTS else 0
        with path.open("rb") as file:
            if step <= _PIECE:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            else:
                for index in range(_PIECES):
                    file.seek(index * step)
                    digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]

"""What the files hold that a comparison reads: the same name may stand for other text, items or weights tomorrow."""

from __future__ import annotations

import filecmp
import glob
import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.config import Recipe
from secateur.errors import InputError
from secateur.methods import METHODS

_PIECES = 64
_PIECE = 1 << 16
"""Of a file of weights so many bytes are read in so many places: training changes all of it, and it may be large."""
_WEIGHTS = (".safetensors", ".bin")
_MODEL_FILES = (*_WEIGHTS, ".json", ".model", ".jinja", ".py")
_INCLUDED = re.compile(r"^include:\s*['\"]?([^\s'\"]+)", re.MULTILINE)
_FOLDER = re.compile(r"(?:dataset_path|data_dir):\s*['\"]?([^\s'\",}]+)")


def digests(recipe: Recipe, tasks: Sequence[str]) -> dict[str, str]:
    """Local file, task or model folder, as it is named → the first 16 digits of a SHA-256 of what it holds.

    Text sources that come with a package or from the hub, tasks of the harness, and models by a hub id or a built-in
    name are left out. Of weights, size and samples are read. Raises InputError for a file that cannot be read.
    """
    texts = (recipe.calibration.text, recipe.recovery.text, recipe.recovery.instructions, recipe.evaluation.text)
    wanted = {name: [_path(name)] for names in texts for name in names if _path(name).is_file()}
    wanted |= {name: sorted(_task_files(_path(name))) for name in tasks if _path(name).exists()}
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


def code_of(method: str) -> str:
    """The first 16 digits of a SHA-256 of the file that defines a method of one's own; empty for the built-in ones.

    The whole file, as what the method calls may have changed; empty also where there is none (an interactive session).
    """
    one = METHODS[method]
    if one.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    try:
        return _digest([Path(inspect.getfile(one))])
    except (OSError, TypeError):
        return ""


def same_file(one: str, other: str) -> bool:
    """Whether two names of text stand for the same file, or for files that hold the same."""
    paths = _path(one), _path(other)
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def _task_files(path: Path) -> set[Path]:
    """A task file or those of a folder, with what they include, call and name: other files, folders of items, code."""
    waiting = list(path.glob("*.yaml")) if path.is_dir() else [path]
    tasks, others = set[Path](), set[Path]()
    while waiting:
        if (file := waiting.pop()) not in tasks:
            text = file.read_text(encoding="utf-8", errors="replace")
            tasks.add(file)
            others |= {*file.parent.glob("*.py"), *_named(file, text)}
            waiting += [one for word in _INCLUDED.findall(text) for one in _places(file, word) if one.is_file()]
    return tasks | others


def _named(file: Path, text: str) -> Iterator[Path]:
    """The files that a task file names, by patterns too, and those in its folders of data."""
    for word in set(re.findall(r"[^\s'\"\[\]{},]+", text)):
        for path in _places(file, word) if re.search(r"\w", word) else []:  # a lone * is no pattern of files
            yield from (found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
    for word in _FOLDER.findall(text):
        for path in _places(file, word):
            yield from (found for found in path.rglob("*") if found.is_file())


def _places(file: Path, word: str) -> list[Path]:
    """Where a name in a task file may lie: as it is, or beside the task file."""
    return [Path(word), file.parent / word] if len(word) < 1000 else []


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

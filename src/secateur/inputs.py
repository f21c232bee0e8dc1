"""The input files of a recipe. No output may overwrite them, or be written into a model's folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from secateur.config import Recipe
from secateur.errors import InputError, SecateurError
from secateur.loading.adapters import ADAPTER_CONFIG, is_adapter_folder
from secateur.reading import path_of, read_json
from secateur.whole import place_of

_INCLUDED = re.compile(r"^include:\s*['\"]?([^\s'\"]+)", re.MULTILINE)
_FOLDER = re.compile(r"(?:dataset_path|data_dir):\s*['\"]?([^\s'\",}]+)")


def refuse_inputs(
    output: str | os.PathLike[str], recipe: Recipe, tasks: Sequence[str] = (), others: Sequence[Path | None] = ()
) -> None:
    """Raise InputError when ``output``, under any name or link, is an input file, or is in a folder of a model or of
    tasks.

    Args:
        tasks: names of tasks, task files or folders, as they were given.
        others: further input files, such as the recipe's own.
    """
    place = place_of(output)
    for what, path in (*_inputs(recipe, tasks), *(("file", path) for path in others if path is not None)):
        if not os.path.exists(path):  # Path.exists raises for names that are too long
            continue
        if _is_same(place, path):
            raise InputError(f"{output} is an input ({what} {path}), and would be replaced. Name another output.")
        if os.path.isdir(path) and any(_is_same(above, path) for above in place.parents):
            raise InputError(
                f"{output} is in the folder of the {what}, {path}, which is not changed. Name another output."
            )


def _inputs(recipe: Recipe, tasks: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Kind and path of each input; built-in names and words that are no paths have none."""
    recovery = recipe.recovery
    texts = [*recipe.calibration.text, *recovery.text, *recovery.instructions, *recipe.evaluation.text]
    analysis = [] if recipe.budget.protect_from is None else [str(recipe.budget.protect_from)]
    for what, names in (("model", [recipe.model.name]), ("text", texts), ("task", tasks), ("analysis", analysis)):
        for name in names:
            with suppress(SecateurError):  # a fault of a name is reported where it is opened
                yield what, path_of(name)
    with suppress(HFValidationError):  # not a hub id
        yield "model", Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=recipe.model.name, repo_type="model"))
    with suppress(SecateurError, KeyError, TypeError):
        folder = path_of(recipe.model.name)
        if is_adapter_folder(folder):
            yield "model", path_of(read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"])
    for name in tasks:
        with suppress(SecateurError, OSError):
            if path_of(name).exists():
                yield from (("file of a task", path) for path in sorted(task_files(path_of(name))))


def task_files(path: Path) -> set[Path]:
    """A task file or those of a folder, with all files that they include, call or name: other files, items, code."""
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
    """Possible paths of a name in a task file: as it is, or beside the task file."""
    return [Path(word), file.parent / word] if len(word) < 1000 else []


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False

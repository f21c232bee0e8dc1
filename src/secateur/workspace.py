"""The files of an unfinished run: beside its output, stage by stage, each written atomically."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.keeping import keep, keep_tensors, take, take_tensors
from secateur.reading import parse_json, read_json, read_text
from secateur.types import Scores
from secateur.whole import beside, place_of, remove, write_whole

T = TypeVar("T")


class Workspace:
    """The files of a run before it is finished, in ``.OUT.secateur`` beside ``OUT``; in memory when there is no OUT.

    A stage's file exists only when the stage is finished: it is written under a temporary name and then renamed. A file
    that cannot be read (after a failure of the disk) counts as missing, and its stage is run again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []

    @staticmethod
    def place(output: Path, recipe: str, resume: bool, contents: Mapping[str, str]) -> Path:
        """Folder of a run for ``output``; raises InputError as ``open`` does, and writes nothing.

        ``contents`` may be a part of those for ``open``; the others are not checked.
        """
        folder = _folder_of(output)
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(
                f"{folder} is in the way: secateur keeps unfinished runs under this name. Move or rename it."
            )
        if not _begun(folder):
            return folder  # there is nothing to lose
        if not resume:
            raise InputError(
                f"An unfinished run for {output} is kept in {folder}. Add --resume to continue it, or delete that "
                "folder to start again."
            )
        anew = f"The settings of that run are not known. Delete the folder {folder} to start again."
        before = read_text(folder / "recipe.yaml", advice=anew)
        if before != recipe:
            was, now = _first_difference(before, recipe)
            raise InputError(
                f"The unfinished run in {folder} was started with another recipe ({folder / 'recipe.yaml'}): {was!r} "
                f"there, {now!r} here. Repeat its settings to resume it, or delete that folder to start again."
            )
        known = read_json(folder / "contents.json", advice=anew)
        if not isinstance(known, dict):
            raise InputError(f"{folder / 'contents.json'} is damaged. {anew}")
        changed = [name for name, digest in contents.items() if known.get(name) != digest]
        if changed:
            raise InputError(
                f"The unfinished run in {folder} was started with other contents under the same names. Changed since: "
                f"{', '.join(changed)}. Put back the old ones to resume it, or delete that folder to start again."
            )
        return folder

    @classmethod
    def open(cls, output: Path | None, recipe: str, resume: bool, contents: Mapping[str, str]) -> Workspace:
        """Start a run, or resume an interrupted one.

        Args:
            output: the finished folder; None keeps nothing on disk.
            recipe: the full recipe as text. A run is resumed only with the same recipe.
            resume: whether to resume an unfinished run.
            contents: name of each input → its digest. A run is resumed only with the same.

        Raises InputError when there is an unfinished run and ``resume`` is not set, or when its recipe or contents
        differ.
        """
        if output is None:
            return cls(None)
        folder = cls.place(output, recipe, resume, contents)
        try:
            if not _begun(folder):
                remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            space = cls(folder)
            space.write_text("recipe.yaml", recipe)
            space.write_json("contents.json", dict(contents))
        except OSError as error:
            if folder.is_dir() and not _begun(folder):
                remove(folder)
            raise InputError(f"Cannot write beside {output}: {error.strerror}. Choose another folder.") from error
        if (folder / "run.jsonl").exists():
            space.events = read_json_lines(folder / "run.jsonl")
        return space

    def inside(self, name: str) -> Workspace:
        """A workspace of its own for a part of the run, in the folder ``name`` of this one."""
        return _Part(self, name)

    def path(self, name: str) -> Path | None:
        """Path of a stage's file or folder, or None when nothing is kept on disk."""
        return None if self.folder is None else self.folder / name

    def write_text(self, name: str, text: str) -> None:
        if self.folder is not None:
            write_whole(self.folder / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str, kind: type[T]) -> T | None:
        """The content of ``write_json`` as a ``kind`` (by pydantic); None when it is missing or damaged."""
        return take(self.path(name), lambda path: TypeAdapter(kind).validate_python(read_json(path)))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        keep_tensors(self.path(name), tensors)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of ``write_tensors``; None when they are missing or damaged."""
        found = take_tensors(self.path(name))
        return None if found is None else found[0]

    def write_scores(self, name: str, scores: Scores) -> None:
        keep(self.path(name), scores.save)

    def read_scores(self, name: str) -> Scores | None:
        """The scores of ``write_scores``; None when they are missing or damaged."""
        return take(self.path(name), Scores.load)

    def write_weights(self, name: str, model: nn.Module) -> None:
        """Keep all weights of ``model``; tied ones once."""
        keep(self.path(name), lambda scratch: save_model(model, str(scratch)))

    def read_weights(self, name: str, model: nn.Module) -> bool:
        """Load the weights of ``write_weights`` into a model of the same shapes; False when they are missing or
        damaged."""
        return take(self.path(name), lambda path: load_model(model, str(path))) is not None

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event, with the time, to ``run.jsonl``."""
        entry = {"time": round(time.time(), 1), **event}
        self.events.append(entry)
        if self.folder is not None:
            with (self.folder / "run.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def discard(self, name: str) -> None:
        """Remove files of a stage: a folder that is no longer needed, or the files of a stage that must run again."""
        if self.folder is not None:
            remove(self.folder / name)

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """A context that removes the folder on an error, if nothing of the run is kept yet."""
        try:
            yield
        except BaseException:
            if self.folder is not None and self.folder.is_dir() and not _begun(self.folder):
                remove(self.folder)
            raise

    def remove(self) -> None:
        """Remove the workspace of a finished run, whose results are in the output folder."""
        if self.folder is not None:
            remove(self.folder)

    @staticmethod
    def tidy(output: Path, recipe: str) -> None:
        """Remove the workspace of a run with this recipe that was killed after its ``output`` was finished."""
        folder = _folder_of(output)
        written = folder / "recipe.yaml"
        if folder.is_dir() and (not written.exists() or read_text(written) == recipe):
            remove(folder)


class _Part(Workspace):
    """The files of a part of a run. Its events are events of the run."""

    def __init__(self, whole: Workspace, name: str) -> None:
        super().__init__(whole.path(name))
        self.whole, self.name = whole, name
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, event: Mapping[str, Any]) -> None:
        """See ``Workspace.log``."""
        self.whole.log({"part": self.name, **event})


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file with one on each line.

    An incomplete line of a killed run is removed from the file, because the next line would be appended to it.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    found = []
    for line in text.split("\n"):  # not splitlines, which also splits at U+2028 and others that JSON may contain
        with suppress(InputError):
            value = parse_json(line, "")
            if isinstance(value, dict):
                found.append((line, value))
    mended = "".join(f"{line}\n" for line, _ in found)
    if mended != text:
        write_whole(file, mended)
    return [value for _, value in found]


def _first_difference(before: str, now: str) -> tuple[str, str]:
    """The first lines that differ, of two texts that do."""
    pairs = zip_longest(before.splitlines(), now.splitlines(), fillvalue="")
    return next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))


def _folder_of(output: Path) -> Path:
    return beside(place_of(output), "secateur")


def _begun(folder: Path) -> bool:
    """Whether anything of a run is kept beside its recipe and contents."""
    asked = ("recipe.yaml", "contents.json", "run.jsonl", "sized.yaml")
    return folder.is_dir() and any(
        path.name not in asked and not path.name.endswith(".saving") for path in folder.iterdir()
    )

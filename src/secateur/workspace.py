"""Where an unfinished run lives: beside its output, stage by stage, each written whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.progress import say
from secateur.whole import whole, write_whole


class Workspace:
    """The files of a run before it is finished, in ``.OUT.secateur`` beside ``OUT``; in memory when there is no OUT.

    A stage's file exists only when the stage is finished: it is written under a temporary name and then renamed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []

    @staticmethod
    def place(output: Path, recipe: str, resume: bool, contents: Mapping[str, str]) -> Path:
        """Folder of a run for ``output``; raises InputError as ``open`` does, and writes nothing.

        ``contents`` may be a part of those given to ``open``: the others are not looked at.
        """
        folder = output.absolute().parent / f".{output.name}.secateur"
        written = folder / "recipe.yaml"
        if not _begun(folder):
            return folder  # there is nothing to lose
        if written.exists() and not resume:
            raise InputError(
                f"An unfinished run for {output} is kept in {folder}. Add --resume to go on with it, "
                "or delete that folder to start anew."
            )
        before = written.read_text(encoding="utf-8") if written.exists() else recipe
        if before != recipe:
            was, now = _first_difference(before, recipe)
            raise InputError(
                f"The unfinished run in {folder} was started with another recipe ({written}): {was!r} there, {now!r} "
                "here. Repeat its settings to resume it, or delete that folder to start anew."
            )
        noted = folder / "contents.json"
        known = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
        changed = [name for name, digest in contents.items() if known.get(name) != digest]
        if changed:
            raise InputError(
                f"The unfinished run in {folder} was started with other contents under the same names. Changed since: "
                f"{', '.join(changed)}. Put back what was there to resume it, or delete that folder to start anew."
            )
        return folder

    @classmethod
    def open(cls, output: Path | None, recipe: str, resume: bool, contents: Mapping[str, str]) -> Workspace:
        """Start a run, or go on with the one that was interrupted.

        Args:
            output: where the finished folder will be; None keeps nothing on disk.
            recipe: the full recipe as text: a run goes on only with the recipe that it was started with.
            resume: whether to go on with what is there.
            contents: what the run computes from, by name, with a digest of each: a run goes on only with the same.

        Raises InputError when an unfinished run is there and ``resume`` is not set, or when its recipe or contents
        differ.
        """
        if output is None:
            return cls(None)
        folder = cls.place(output, recipe, resume, contents)
        try:
            if not _begun(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            space = cls(folder)
            space.write_text("recipe.yaml", recipe)
            space.write_json("contents.json", dict(contents))
        except OSError as error:
            if folder.is_dir() and not _begun(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise InputError(f"Cannot write beside {output}: {error.strerror}. Choose another folder.") from error
        if (folder / "run.jsonl").exists():
            space.events = read_json_lines(folder / "run.jsonl")
        return space

    def path(self, name: str) -> Path | None:
        """Path of a stage's file or folder, or None when nothing is kept on disk."""
        return None if self.folder is None else self.folder / name

    def has(self, name: str) -> bool:
        path = self.path(name)
        return path is not None and path.exists()

    def write_text(self, name: str, text: str) -> None:
        if self.folder is not None:
            write_whole(self.folder / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        assert self.folder is not None
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def metrics(self) -> dict[str, Any]:
        """The numbers of the stages that are finished."""
        found: dict[str, Any] = self.read_json("metrics.json") if self.has("metrics.json") else {}
        return found

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is not None:
            with whole(self.folder / name) as scratch:
                save_file(tensors, scratch)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        assert self.folder is not None
        return load_file(self.folder / name)

    def write_weights(self, name: str, model: nn.Module) -> None:
        """Keep all weights of ``model``; tied ones once."""
        if self.folder is not None:
            with whole(self.folder / name) as scratch:
                save_model(model, str(scratch))

    def read_weights(self, name: str, model: nn.Module) -> None:
        """Load what ``write_weights`` kept into a model of the same shapes."""
        assert self.folder is not None
        load_model(model, str(self.folder / name))

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event, with the time, to ``run.jsonl``."""
        entry = {"time": round(time.time(), 1), **event}
        self.events.append(entry)
        if self.folder is not None:
            with (self.folder / "run.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def discard(self, name: str) -> None:
        """Remove what a stage kept on its way (a folder), now that its result is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @contextmanager
    def stage(self, name: str, title: str, metrics: dict[str, Any]) -> Iterator[None]:
        """Say what happens, time it into ``metrics["seconds"]``, and keep the numbers so far."""
        say(title)
        started = time.monotonic()
        yield
        seconds = metrics.setdefault("seconds", {})
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 1)
        self.write_json("metrics.json", metrics)
        self.log({"stage": name, "seconds": seconds[name]})

    def remove(self) -> None:
        """The run is finished and its results are in the output folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file with one on each line.

    A line that a kill cut short is taken out of the file, as the next one would be written onto its end.
    """
    text = file.read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            found.append((line, json.loads(line)))
    mended = "".join(f"{line}\n" for line, _ in found)
    if mended != text:
        write_whole(file, mended)
    return [value for _, value in found]


def _first_difference(before: str, now: str) -> tuple[str, str]:
    """The first lines that differ, of two texts that do."""
    pairs = zip_longest(before.splitlines(), now.splitlines(), fillvalue="")
    return next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))


def _begun(folder: Path) -> bool:
    """Whether anything was kept of a run: more than what it was asked for."""
    asked = ("recipe.yaml", "contents.json", "run.jsonl")
    return folder.is_dir() and any(path.name not in asked for path in folder.iterdir())

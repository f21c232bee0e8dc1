"""The checksums of a finished folder: whether each of its files is still as it was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from secateur.errors import InputError
from secateur.reading import read_text

SUMS = "SHA256SUMS"
"""The file's name; ``sha256sum -c`` reads it."""
_PAGES = (".md", ".html")


def write_sums(folder: Path, file: Path) -> None:
    """Write the SHA-256 of every file in ``folder`` to ``file``, which lies in it; the last to be written.

    Pages for people are left out: whoever edits the model card has not damaged the model.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in _PAGES)
    names = sorted(path.relative_to(folder) for path in files)
    file.write_text("".join(f"{_sum(folder / name)}  {name.as_posix()}\n" for name in names), encoding="utf-8")


def check_sums(folder: Path, file: Path) -> None:
    """Raise InputError, by name, when a file in ``folder`` is not as ``file`` says, or gone, or when that is damaged.

    What was added since is not looked at.
    """
    changed = _first_changed(folder, file)
    if changed is not None:
        raise InputError(
            f"What was asked for is finished in {folder}, and {changed} is not as it was written: edited since, "
            "damaged, or gone. Name another folder, or delete this one to have it made again."
        )


def _first_changed(folder: Path, file: Path) -> Path | None:
    lines = read_text(file).split("\n") if file.is_file() else []
    if len(lines) < 2 or lines.pop():  # empty, or its last line is cut short
        return file
    for line in lines:
        digest, gap, name = line.partition("  ")
        if not gap:
            return file
        path = folder / name
        if not path.is_file() or _sum(path) != digest:
            return path
    return None


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The checksums of a finished folder, which show whether a file was changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from secateur.errors import InputError
from secateur.reading import read_text

SUMS = "SHA256SUMS"
"""The file's name; ``sha256sum -c`` reads it."""
_PAGES = (".md", ".html")


def write_sums(folder: Path, file: Path) -> None:
    """Write the SHA-256 of every file in ``folder`` to ``file`` in it. It is the last file to be written.

    Pages for people are left out: editing the model card does not damage the model.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in _PAGES)
    names = sorted(path.relative_to(folder) for path in files)
    file.write_text("".join(f"{_sum(folder / name)}  {name.as_posix()}\n" for name in names), encoding="utf-8")


def check_sums(folder: Path, file: Path) -> None:
    """Raise InputError with the name when a file in ``folder`` does not match ``file``, is missing, or when ``file`` is
    damaged.

    Files added since are ignored.
    """
    changed = _first_changed(folder, file)
    if changed is not None:
        raise InputError(
            f"This run is finished in {folder}, and {changed} is not as it was written: it was edited, damaged or "
            "removed. Name another folder, or delete this one to run again."
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

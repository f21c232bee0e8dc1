"""Files and folders that are there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or a folder to: it becomes ``path`` when all goes well, or else it goes.

    A file that is there is replaced, a folder only when it is empty. What a killed process left is removed first.
    """
    scratch = path.with_name(f".{path.name}.saving")
    _remove(scratch)
    try:
        yield scratch
        if scratch.is_dir() and path.is_dir():
            path.rmdir()
        os.replace(scratch, path)
    finally:
        _remove(scratch)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by ``whole``, in UTF-8."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

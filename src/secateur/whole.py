"""Atomic writes of files and folders, and the paths of outputs and of the files beside them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import InputError
from secateur.reading import brief, path_of

_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Longest name of a file in bytes, on common file systems."""
_ROOM = 200
"""Bytes reserved for the names of files within an output, and for the prefix and ending of its name."""


def cache_folder() -> Path:
    """The folder for converted models and written text: SECATEUR_CACHE, else the user's cache folder."""
    chosen = os.environ.get("SECATEUR_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur"


def place_of(output: str | os.PathLike[str], what: str = "The output") -> Path:
    """The absolute path of a file or folder to be written, without links. Creates nothing.

    Raises InputError for an invalid name (``path_of``), for names that are too long, also when the folders above do not
    exist yet, and for names that are not UTF-8, which libraries that open model folders do not support.
    """
    try:
        path = path_of(output, what).resolve()
    except (OSError, RuntimeError) as error:  # the working folder no longer exists; links in a circle
        raise InputError(f"{what} {brief(str(output))} is no path: {error}. Give another one.") from error
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise InputError(f"{what} {brief(str(path))} is no path: a name in it is too long. Give another one.")
    if len(os.fsencode(path)) + _ROOM > _LONGEST_PATH:
        raise InputError(f"{what} {brief(str(path))} is too long for the files in it. Give a shorter one.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} {brief(str(path))} has a name that is not UTF-8, which not all programs support. Give another one."
        ) from error
    return path


def beside(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` for temporary files: ``.NAME.ENDING``, with a long NAME shortened."""
    name = f".{path.name}.{ending}"
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]
        name = f".{path.name.encode()[: _LONGEST_NAME - 100].decode(errors='ignore')}~{digest}.{ending}"
    return path.with_name(name)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for writing a file or a folder. It is renamed to ``path`` on success, and removed on an
    error.

    An existing file is replaced, a folder only when it is empty. Files of a killed process are removed first, therefore
    only one caller may write ``path`` (``lock.held``). Everything is on the disk before the rename: after a power cut
    there is either all of it, or the previous state.
    """
    scratch = beside(path, "saving")
    remove(scratch)
    try:
        yield scratch
        store(scratch)
        os.replace(scratch, path)
        _store_names(path.parent)
    finally:
        remove(scratch)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by ``whole``, in UTF-8."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def open_permissions(path: Path) -> None:
    """Give ``path`` and all below it the default permissions; temporary folders and weight files are private."""
    umask = os.umask(0)
    os.umask(umask)
    for each in (path, *path.rglob("*")):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def store(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk."""
    if not path.is_dir():
        store_file(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            store_file(Path(folder, name))
        _store_names(Path(folder))


def store_file(path: Path) -> None:
    """Flush the content of ``path`` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _store_names(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk, where the file system supports that."""
    try:
        store_file(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR, errno.EBADF):
            raise

"""One run at a time for an output: a file beside it names the process, and its machine, that writes it."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from secateur.errors import InputError
from secateur.whole import beside, place_of

try:
    import fcntl
except ImportError:  # not on this system: only the file is used
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")

_SAME_START_SECONDS = 2.0
"""Tolerance of start times, in seconds: the system's clock may be adjusted."""


class _Owner(NamedTuple):
    """A process that writes."""

    pid: int
    host: str
    started: float
    """Start in seconds since the epoch; another process may get the same number later."""


class _Held(NamedTuple):
    thread: int
    descriptor: int


_held: dict[Path, _Held] = {}
"""The lock files of this process."""


def alone(argument: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: the function locks the output in its argument of this name while it runs; None locks nothing."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            place = signature.bind(*args, **kwargs).arguments.get(argument)
            with nullcontext() if place is None else held(place):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def held(output: str | os.PathLike[str]) -> Iterator[None]:
    """Lock ``output`` for one run, on this machine and on others with the same folder.

    The thread with the lock may enter again. Raises InputError for an invalid path (``place_of``), for one that cannot
    be written, and when another run has the lock: the message names its process and machine. The lock of a dead process
    of this machine (killed, a power cut) is taken over. A process of another machine cannot be checked; the message
    then names the file to delete. The file is ``.NAME.running`` beside the output. It is removed afterwards, with
    folders above it that were made for it and are empty.

    Where the file system supports ``flock``, it is used, and a dead process never has the lock. Elsewhere process
    number and start are compared. A forked child does not inherit the lock.
    """
    place = place_of(output)
    if not place.name:  # the root of the file system, which other checks refuse
        yield
        return
    file, process, thread = beside(place, "running"), os.getpid(), threading.get_ident()
    if file in _held and _held[file].thread == thread:
        yield
        return
    made: list[Path] = []
    try:
        try:
            _make(file.parent, made)
            descriptor = _take(file, place)
        except OSError as error:
            raise InputError(
                f"Cannot write beside {place}: {error.strerror or error}. Choose another folder."
            ) from error
        _held[file] = _Held(thread, descriptor)
        try:
            yield
        finally:
            if os.getpid() == process:  # not in a forked child that ends on its own
                del _held[file]
                _release(file, descriptor)
    finally:
        if os.getpid() == process:
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    """Make ``folder`` and those above it, and note which were made."""
    for one in (*reversed(folder.parents), folder):
        with suppress(FileExistsError):
            if not one.is_dir():
                one.mkdir()
                made.append(one)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder")


def _take(file: Path, place: Path) -> int:
    """Open ``file`` and write this process into it; raises InputError when another process has the lock."""
    while True:
        opened = _open(file)
        if opened is None:
            continue
        descriptor, is_new = opened
        free = taken = False
        try:
            locked = _lock(descriptor)
            if not _is_open(file, descriptor):  # its owner has just removed it
                continue
            owner = _read(descriptor, file, place)
            free = locked is not False and (is_new or (locked is True if owner is None else _is_dead(owner)))
            if not free:
                raise InputError(_refusal(owner, file, place))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_this_process()._asdict()).encode(), 0)
            taken = True
            return descriptor
        finally:
            if free and not taken:  # interrupted, or the disk is full
                _release(file, descriptor)
            elif not taken:
                os.close(descriptor)


def _open(file: Path) -> tuple[int, bool] | None:
    """A descriptor, and whether the file is new; None when it was created or removed in between."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        pass
    try:
        return os.open(file, os.O_RDWR), False
    except FileNotFoundError:
        return None


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open(file: Path, descriptor: int) -> bool:
    """Whether ``file`` is still the one that was opened."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int, file: Path, place: Path) -> _Owner | None:
    """The owner in the file; None when nothing was written yet. Raises InputError for a file of another program."""
    text = os.pread(descriptor, 4096, 0)
    try:
        return _Owner(**json.loads(text)) if text.strip(b"\0 ") else None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{file} is in the way: it should name the run that is writing {place}, and does not. If there is no such "
            "run, delete it."
        ) from error


def _is_dead(owner: _Owner) -> bool:
    """Whether a process of this machine is known to have ended."""
    import psutil

    if owner.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(owner.pid)
        same = abs(process.create_time() - owner.started) < _SAME_START_SECONDS
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _this_process() -> _Owner:
    import psutil

    return _Owner(os.getpid(), socket.gethostname(), psutil.Process().create_time())


def _refusal(owner: _Owner | None, file: Path, place: Path) -> str:
    if owner is None:
        return f"Another run is writing {place}. Name another output; if no run is, delete {file}."
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner.started))
    said = f"Another run is writing {place}: process {owner.pid} on {owner.host}, started at {began}. "
    if owner.host == socket.gethostname():
        return f"{said}Wait for its end, stop it, or name another output."
    return f"{said}Wait for its end, or name another output; if that run is dead, delete {file}."


def _release(file: Path, descriptor: int) -> None:
    if _is_open(file, descriptor):
        file.unlink(missing_ok=True)
    os.close(descriptor)


def _forget() -> None:
    """In a forked child: forget the lock, which belongs to the parent only."""
    for held in _held.values():
        with suppress(OSError):
            os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

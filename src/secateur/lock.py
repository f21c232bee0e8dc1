"""One run at a time for an output: a file beside it names the process, and its machine, that is at work there."""

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
except ImportError:  # not on this system: the file alone must do
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")

_SAME_START_SECONDS = 2.0
"""The system says when a process started by clocks that are set now and then."""


class _Owner(NamedTuple):
    """A process that writes."""

    pid: int
    host: str
    started: float
    """Seconds since the epoch: another process may have the same number later."""


class _Held(NamedTuple):
    thread: int
    descriptor: int


_held: dict[Path, _Held] = {}
"""The files that this process holds."""


def alone(argument: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function becomes one that holds the place in its argument of this name while it runs; None is no place."""

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
    """Be the only one that writes ``output``, on this machine and on others that see the same folder.

    The thread that holds it may enter again. Raises InputError for a place that cannot be (``place_of``) or cannot be
    written, and when another run holds it: the message names its process and machine. What a process of this machine
    left that is dead (killed, a power cut) is taken over; one of another machine cannot be asked, and the message says
    which file to delete. The file is ``.NAME.running`` beside the output; afterwards it is gone, with folders above it
    that were made for it and hold nothing else.

    Where the file system knows ``flock``, the lock is one, which no dead process has; elsewhere process number and
    start must do. A forked child holds nothing.
    """
    place = place_of(output)
    if not place.name:  # the root of the file system, which everybody refuses
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
    """Open ``file`` and write this process into it; raises InputError when another one is at work."""
    while True:
        opened = _open(file)
        if opened is None:
            continue
        descriptor, is_new = opened
        free = taken = False
        try:
            locked = _lock(descriptor)
            if not _is_open(file, descriptor):  # who had it has just removed it
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
    """A descriptor, and whether the file is a new one; None when it came or went in between."""
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
    """Who is named in the file; None when nothing was written yet. InputError for a file of somebody else."""
    text = os.pread(descriptor, 4096, 0)
    try:
        return _Owner(**json.loads(text)) if text.strip(b"\0 ") else None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{file} is in the way: it should say which run is writing {place}, and does not. If none is, delete it."
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
    """In a forked child: the lock is its parent's alone, and ends with that."""
    for held in _held.values():
        with suppress(OSError):
            os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

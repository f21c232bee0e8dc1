"""Finds a class by its name: a built-in one, or one of the user's own as ``package.module:Class``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import InputError
from secateur.reading import brief, shortened

T = TypeVar("T")


def find(name: Any, known: Mapping[str, type[T]], *bases: type) -> type[T]:
    """The class ``name``: an entry of ``known``, or ``package.module:Class``, which is imported.

    Only a name of that form is imported, and only from Python's own search path (PYTHONPATH).

    Raises InputError for an unknown name (with the nearest known one), for a module or class that does not exist, and
    for a class that is no subclass of ``bases``, lacks an abstract method, or has no ``name``.
    """
    kind = bases[0].__name__.lower()
    kinds = "criteria" if kind == "criterion" else f"{kind}s"
    if isinstance(name, str) and name in known:
        return _checked(known[name], bases, name)
    if isinstance(name, str) and ":" in name:
        return _checked(_imported(name, kind), bases, name)
    shown = shortened(name if isinstance(name, str) else brief(name))
    near = difflib.get_close_matches(shown, known, 1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise InputError(
        f"Unknown {kind} {shown}{guess}. Known {kinds}: {', '.join(known)}; or "
        "a class of your own as package.module:Class."
    )


def source_digest(classes: Iterable[type]) -> str:
    """The first 16 digits of a SHA-256 of the files that define these classes; empty when all are secateur's own.

    It covers whole files, because functions that a class calls may have changed. A class without a file (an interactive
    session) is left out.
    """
    files = set()
    for one in classes:
        if one.__module__.partition(".")[0] != __name__.partition(".")[0]:
            with suppress(OSError, TypeError):
                files.add(Path(inspect.getfile(one)))
    try:
        parts = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(files)]
    except OSError:
        return ""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16] if parts else ""


def _imported(name: str, kind: str) -> Any:
    module, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), path)):
        raise InputError(f"{shortened(name)} does not name a {kind}. Write package.module:Class.")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # its code runs, and may raise anything; a script may end
        raise InputError(
            f"The {kind} {shortened(name)} cannot be imported: {type(error).__name__}: {error}. Add the folder of the "
            "module to PYTHONPATH."
        ) from error
    if not hasattr(found, path):
        raise InputError(f"The module {module} ({getattr(found, '__file__', None) or 'built in'}) has no {path}.")
    return getattr(found, path)


def _checked(found: Any, bases: tuple[type, ...], name: str) -> Any:
    kind = bases[0].__name__.lower()
    if not (isinstance(found, type) and issubclass(found, bases)):
        wanted = " or ".join(f"{base.__module__}.{base.__name__}" for base in bases)
        raise InputError(f"{shortened(name)} is no {kind}: its class must be a subclass of {wanted}.")
    lacking = sorted(getattr(found, "__abstractmethods__", ()))
    if not isinstance(getattr(found, "name", None), str):
        lacking.append("name")
    if lacking:
        raise InputError(f"{shortened(name)} is no whole {kind}: its class lacks {', '.join(lacking)}.")
    return found

"""Reads input of people and other programs: names of files, text and JSON. Each refusal is one message.

Every foreign file is read through this room. It refuses files that are not ordinary (a device has no end), text that is
not UTF-8, deep nesting, numbers of thousands of digits, and names that the file system does not support.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from secateur.errors import InputError, SecateurError

DEEPEST = 100
"""Levels of nesting that JSON and YAML may have. Real files have about ten."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 20
_SHORT.maxlevel = 4


def brief(value: Any, longest: int = 100) -> str:
    """``repr`` of an input value for a message; only the beginning of a large one."""
    try:
        shown = _SHORT.repr(value)
    except ValueError:  # Python refuses to write numbers of more than 4,300 digits
        shown = "a number of too many digits"
    return shortened(shown, longest)


def shortened(text: str, longest: int = 100) -> str:
    """A text for a message; only the beginning of a long one."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def path_of(name: str | os.PathLike[str], what: str = "The path", error: type[SecateurError] = InputError) -> Path:
    """``name`` as a path, with ``~`` replaced; raises ``error`` for a name that no file can have.

    Args:
        what: begins the message, such as ``The model``.

    The path need not exist. Refused are values that are no names, an empty name, a NUL character, the home of an
    unknown user, names that are too long for the file system, and links in a circle.
    """
    if not isinstance(name, str | os.PathLike):  # callers in Python may give any object
        raise error(f"{what} is {brief(name)}. Give the path of a file or folder.")
    shown = repr(os.fspath(name))[1:-1]
    shown = shown if len(shown) <= 80 else f"{shown[:60]}…"
    if not os.fspath(name).strip():
        raise error(f"{what} has no name: it is empty. Give the path of a file or folder.")
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except FileNotFoundError:
        pass
    except (RuntimeError, ValueError) as reason:  # no such user's home; a NUL character
        raise error(f"{what} {shown} is no path: {str(reason).rstrip('.')}. Give another one.") from reason
    except OSError as reason:
        if isinstance(reason, NotADirectoryError | PermissionError):
            return path
        raise error(f"{what} {shown} is no path: {reason.strerror}. Give another one.") from reason
    return path


def read_text(path: Path, *, error: type[SecateurError] = InputError, advice: str = "") -> str:
    """The text of an ordinary file in UTF-8, with or without a byte order mark; raises ``error`` with ``advice``."""
    with open_text(path, error=error, advice=advice) as file:
        return file.read()


@contextmanager
def open_text(path: Path, *, error: type[SecateurError] = InputError, advice: str = "") -> Iterator[TextIO]:
    """An ordinary file in UTF-8, open for reading it in parts. Failures meanwhile are raised as ``error``."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is no ordinary file. {advice}".strip())
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as reason:
        raise error(
            f"{path} cannot be read: it is not text in UTF-8 (byte {reason.start}). {advice}".strip()
        ) from reason
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}. {advice}".strip()) from reason


def parse_json(text: str, where: str, *, error: type[SecateurError] = InputError, advice: str = "") -> Any:
    """The value of a JSON text; ``where`` names its place at the start of the message of ``error``."""
    try:
        value = json.loads(text)
        check_depth(value, where, error=error, advice=advice)
    except json.JSONDecodeError as reason:
        place = f"line {reason.lineno}, column {reason.colno}"
        raise error(f"{where} is not JSON ({reason.msg}: {place}). {advice}".strip()) from reason
    except RecursionError as reason:
        raise error(f"{where} is nested too deep. {advice}".strip()) from reason
    except ValueError as reason:  # Python refuses to read numbers of more than 4,300 digits
        raise error(f"{where} contains a number of too many digits. {advice}".strip()) from reason
    return value


def read_json(path: Path, *, error: type[SecateurError] = InputError, advice: str = "") -> Any:
    """``read_text`` and ``parse_json`` of a file; checks that its strings can be written again."""
    text = read_text(path, error=error, advice=advice)
    value = parse_json(text, str(path), error=error, advice=advice)
    check_characters(value, text, str(path), error=error, advice=advice)
    return value


def is_json(value: Any) -> bool:
    """Whether ``value`` is a mapping that JSON can hold, and that is the same when it is read back (NaN aside)."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and _has_text_keys(value)


def _has_text_keys(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return (not isinstance(value, dict) or all(isinstance(key, str) for key in value)) and all(
        map(_has_text_keys, inner)
    )


def check_characters(
    value: Any, text: str, where: str, *, error: type[SecateurError] = InputError, advice: str = ""
) -> None:
    """Raise ``error`` when ``value``, parsed from ``text``, contains half of a surrogate pair, which UTF-8 does not
    support.

    JSON and YAML can contain one, as in ``"\\ud800"``.
    """
    if r"\u" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as reason:
        raise error(f"{where} holds half of a surrogate pair, which is no character. {advice}".strip()) from reason
    except (TypeError, ValueError):  # keys of a type that JSON does not support; a value that contains itself
        return


def check_depth(value: Any, where: str, *, error: type[SecateurError] = InputError, advice: str = "") -> None:
    """Raise ``error`` when lists and mappings in ``value`` are nested more than ``DEEPEST`` levels.

    A value that YAML's anchors repeat is checked once for each level.
    """
    level = [value]
    for _ in range(DEEPEST):
        below = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        level = list({id(item): item for item in below}.values())
        if not level:
            return
    raise error(f"{where} is nested more than {DEEPEST} levels deep. {advice}".strip())

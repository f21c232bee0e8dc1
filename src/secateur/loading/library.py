"""Calls of other libraries: silent, and with their errors in one message of secateur."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from secateur.errors import ModelError, SecateurError, out_of_memory


def first_line(error: BaseException) -> str:
    """The start of a library's message, for quoting; with the next line when the first ends in a colon."""
    said = str(error)
    if isinstance(error, KeyError) and " " not in said:
        said = f"there is no {said}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    start = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (start or type(error).__name__)[:300]


@contextlib.contextmanager
def explained(message: str, name: str) -> Iterator[None]:
    """Raise ModelError, beginning with ``message``, for any error of a library while it opens the model ``name``.

    Too little memory gets its own message, for any error of the library.
    """
    try:
        with quiet_transformers():
            yield
    except SecateurError:
        raise
    except Exception as error:  # they raise RuntimeError, ValueError, OSError, KeyError, bare Exception ...
        if out_of_memory(error):
            raise ModelError(
                f"There is too little memory to open {name} ({first_line(error)}). Free some memory, use a larger "
                "machine, or load the weights in half the bytes with --set model.dtype=bfloat16."
            ) from error
        raise ModelError(f"{message}: {first_line(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' own bars and warnings. Relevant facts are errors, or reported by ``progress``."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

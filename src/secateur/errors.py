"""The errors that users see. Each message has the given value, the allowed values, and the next step."""

from __future__ import annotations

import errno


class SecateurError(Exception):
    """Base of every error that the user can correct. The CLI prints it as one message, without a traceback."""


class InputError(SecateurError):
    """A bad argument, recipe key, file or folder."""


class ModelError(SecateurError):
    """The model cannot be opened, traced or cut."""


class PlanError(SecateurError):
    """The plan does not fit the model, or the budget cannot be met."""


class DataError(SecateurError):
    """Text is missing, unreadable or too short."""


class VerificationError(SecateurError):
    """A written or cut model computes something else than expected."""


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "cannot allocate memory",  # mmap, as torch and safetensors quote it
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",  # cuBLAS
    "os error 12)",  # Rust's words for ENOMEM
    "can't start new thread",  # no room for its stack
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or one of its causes, is a lack of memory of the machine or of an accelerator.

    torch and safetensors report it only in the message, as RuntimeError or as an error of their own.
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if any(words in str(cause).lower() for words in _NO_MEMORY):
            return True
        waiting += [cause.__cause__, cause.__context__]
    return False


def is_full(error: Exception) -> bool:
    """Whether a disk or quota was full. safetensors and torch report it only in the message."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers) or "inline_container.cc" in str(error)

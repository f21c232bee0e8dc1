"""How a command ends: the one place where exceptions and signals become a message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from secateur.errors import SecateurError, is_full, out_of_memory
from secateur.whole import beside, place_of

_ONE_SIGNAL_SECONDS = 10.0
"""A closing terminal and a scheduler send several signals. Those after the first must not interrupt the clean-up."""


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received, from a scheduler or a closed terminal. It is treated like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Commands(TyperGroup):
    """The one place where an exception becomes a message and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:  # from --help and --version, which the parser answers: no space for their output
            if debugging():
                raise
            typer.echo(f"Error: {_message(error)}", err=True)
            sys.exit(1)

    def invoke(self, ctx: Any) -> Any:
        _open_streams()
        try:
            with _signals_raise():
                os.getcwd()
                return super().invoke(ctx)
        except SecateurError as error:
            if debugging():
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(_exit_code(interrupt)) from interrupt
        except Exception as error:
            # errors of the parser (usage errors, --help) have their own exit code; a closed pipe is no error
            if debugging() or hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError):
                raise
            typer.echo(f"Error: {_message(error)}", err=True)
            raise typer.Exit(1) from error


@contextmanager
def resumable(kept: str, output: Path | None = None) -> Iterator[None]:
    """On an interruption, print ``kept`` and end with the exit code that shells use for it. On an error, print where
    the unfinished run for ``output`` is kept."""
    try:
        yield
    except Exception as error:
        if output is not None and (left := _unfinished(output)) is not None and str(left) not in str(error):
            typer.echo(
                f"Finished stages are kept in {left}. Continue with --resume, or delete that folder to start again.",
                err=True,
            )
        raise
    except KeyboardInterrupt as interrupt:
        typer.echo(f"Interrupted. {kept}".strip(), err=True)
        raise typer.Exit(_exit_code(interrupt)) from interrupt


def _unfinished(output: Path) -> Path | None:
    """The folder of an unfinished run for ``output``, if there is one."""
    with suppress(SecateurError):
        folder = beside(place_of(output), "secateur")
        return folder if folder.is_dir() else None
    return None


def debugging() -> bool:
    """Whether ``--debug`` or the environment asks for tracebacks."""
    return os.environ.get("SECATEUR_DEBUG", "") not in ("", "0")


def _exit_code(interrupt: KeyboardInterrupt) -> int:
    return 128 + (interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``Ended``, and clean-up runs as after Ctrl-C.

    A computation of torch in C++ is finished first. A signal that the caller ignores (nohup) is still ignored.
    """
    last = -_ONE_SIGNAL_SECONDS

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _ONE_SIGNAL_SECONDS:
            raise Ended(number)

    old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                old[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _open_streams() -> None:
    """Open null streams for a process that was started without standard streams, or a file would get their numbers. A
    terminal that cannot show a character shows its code."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115  # for as long as it runs
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a caller may have put any writable object there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _message(error: Exception) -> str:
    """One message for an unforeseen error: a failure of the machine, or else a bug."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 1000 else f"{reason[:1000]}…"
    advice = _advice(error)
    if advice is not None:
        return f"{reason}\n{advice}" if reason else advice
    return (
        f"unexpected {type(error).__name__}: {reason}\n"
        "This looks like a bug. Run again as `secateur --debug ...` and report the traceback that it shows."
    )


def _advice(error: Exception) -> str | None:
    """Advice for a failure of the machine or of an input; None for a failure of the program."""
    if out_of_memory(error):
        return "Not enough memory: lower batch sizes or windows, or --set training.gradient_checkpointing=true."
    if is_full(error):
        return (
            "The disk is full. Free some space. --resume continues after the last finished stage, where there is one."
        )
    if isinstance(error, RecursionError) and _was_reading(error):
        return "An input is nested too deep to be read: a model's JSON file, a text or a recipe."
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return "No folder for temporary files is writable. Set TMPDIR to a writable folder with free space."
    if isinstance(error, FileNotFoundError) and _working_folder_is_gone():
        return "The current folder no longer exists. Change to one that exists."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "This path cannot be written or read. Change its permissions, or name another one."
    return None


def _was_reading(error: RecursionError) -> bool:
    """Whether the deepest frames belong to a reader of input, or to a library that processes it."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    return bool({"json", "yaml", "copy", "jinja2", "pydantic"} & set(names[-50:]))


def _working_folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False

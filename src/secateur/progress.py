"""One way of showing progress: a bar with the time left on a terminal, a line now and then elsewhere.

Silent by default: the library prints nothing. The CLI switches it on with ``show()``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_LINE_EVERY_SECONDS = 15.0
_console: Console | None = None


def show(on: bool = True) -> None:
    """Switch progress on (to standard error) or off for this process."""
    global _console
    _console = Console(stderr=True, markup=False, emoji=False, highlight=False) if on else None


def say(message: str) -> None:
    """Print a message for the user; nothing when progress is off."""
    if _console is not None:
        _console.print(message)


class Bar:
    """A progress bar that is advanced by hand; a context manager."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Bar:
        if _console is not None and sys.stderr.isatty():
            label = TextColumn("  {task.description}", markup=False)
            columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=_console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total)
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Advance by ``steps``; ``note`` (such as a loss) is shown beside the description."""
        self.done += steps
        label = f"{self.description} {note}".strip()
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, description=label)
            return
        now = time.monotonic()
        if _console is not None and (now - self._last > _LINE_EVERY_SECONDS):
            self._last = now
            left = (now - self._started) / max(self.done, 1) * (self.total - self.done)
            _console.print(f"  {label}: {self.done}/{self.total}, about {left:.0f} s left")

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if _console is not None:
            seconds = time.monotonic() - self._started
            _console.print(f"  {self.description}: {self.done}/{self.total} in {seconds:.0f} s")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items`` while a bar shows how many are done and how long the rest will take."""
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()

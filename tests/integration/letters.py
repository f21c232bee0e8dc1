"""What several tests read, and the command line that they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from secateur.cli import app


def write_letters(folder: Path) -> Path:
    """A text of eighty documents, ``letters.txt`` in ``folder``."""
    words = "the letter came late and nobody in the house had asked who wrote it".split()
    paragraphs = (" ".join(words[i % 13 :] + words[: i % 13] + [str(i)]) * 24 for i in range(80))
    text = folder / "letters.txt"
    text.write_text("\n\n".join(paragraphs))
    return text


def call(*arguments: str) -> Any:
    """What ``secateur`` with these arguments ends with and says."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

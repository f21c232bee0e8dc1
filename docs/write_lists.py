"""Writes docs/keys.md, and the lists of methods and recipes in other pages, from the code and the recipes.

Run as: python docs/write_lists.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from secateur.config import Key, Recipe, describe
from secateur.methods import METHODS

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def pages() -> dict[Path, str]:
    """Every file that this script writes, with what it must hold."""
    navigation = "".join(f"      - {name}: methods/{name}.md\n" for name in METHODS)
    methods = "".join(f"  * [{name}](methods/{name}.md): {method.summary}.\n" for name, method in METHODS.items())
    recipes = "".join(
        f"| `recipes/{path.name}` | {_first_sentence(path)} |\n" for path in sorted((ROOT / "recipes").glob("*.yaml"))
    )
    head = r"(?<=\| recipe \| what for \|\n\| --- \| --- \|\n)"
    return {
        DOCS / "keys.md": keys(),
        ROOT / "mkdocs.yml": _with(ROOT / "mkdocs.yml", r"(?<=  - Methods:\n)(?: {6}- .*\n)+", navigation),
        DOCS / "index.md": _with(DOCS / "index.md", r"(?<=the paper is silent:\n)(?:  \* .*\n)+", methods),
        DOCS / "recipes.md": _with(DOCS / "recipes.md", head + r"(?:\|.*\n)+", recipes),
    }


def _with(path: Path, old: str, new: str) -> str:
    """The file with the one place that the pattern ``old`` finds replaced."""
    text, count = re.subn(old, lambda _: new, path.read_text())
    assert count == 1, f"{path} has {count} places for a list"
    return text


def _first_sentence(recipe: Path) -> str:
    comment = re.match(r"(?:#.*\n)+", recipe.read_text())
    assert comment is not None
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines())
    return re.split(r"(?<=[^ .][.]) (?=[A-Z])", words)[0].rstrip(".")


def keys() -> str:
    """The page of keys as Markdown: one table per section of the recipe and one per method with keys."""
    lines = [
        "# Every key",
        "",
        "Written by `docs/write_lists.py` from the docstrings of the settings classes. Any of these can stand in a",
        "[recipe](recipes.md) or behind `--set`.",
        "",
    ]
    every = list(describe())
    for section, field in Recipe.model_fields.items():
        here = [key for key in every if key.name.partition(".")[0] == section]
        lines += [f"## {section}", "", field.description or "", "", *_table(here), ""]
        if section == "method":
            for name, method in METHODS.items():
                own = list(describe(method.Settings, "method."))
                if own:
                    lines += [f"### method: {name}", "", *_table(own), ""]
    return "\n".join(lines)


def _table(keys: Iterable[Key]) -> list[str]:
    rows = [(f"`{key.name}`", key.type, f"`{key.default}`" if key.default else "", key.meaning) for key in keys]
    return [
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)

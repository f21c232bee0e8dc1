"""Writes docs/keys.md from the settings classes, so that the page cannot say anything else than the code.

Run as: python docs/write_keys.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from secateur.config import Key, Recipe, describe
from secateur.methods import METHODS

PAGE = Path(__file__).with_name("keys.md")


def page() -> str:
    """The page as Markdown: one table per section of the recipe, then one per method that has keys of its own."""
    lines = [
        "# Every key",
        "",
        "Written by `docs/write_keys.py` from the docstrings of the settings classes. Any of these can stand in a",
        "[recipe](recipes.md) or behind `--set`.",
        "",
    ]
    keys = list(describe())
    for section, field in Recipe.model_fields.items():
        here = [key for key in keys if key.name.partition(".")[0] == section]
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
    PAGE.write_text(page())

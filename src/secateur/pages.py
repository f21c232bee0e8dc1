"""Pages and cards from templates; whatever is put into one cannot break out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup


def html_page(package: str, template: str, values: Mapping[str, Any]) -> str:
    """The HTML that ``template``, a file in ``package``, makes of ``values``; all of these are escaped."""
    return _environment(package, autoescape=True).get_template(template).render(values)


def markdown_page(package: str, template: str, values: Mapping[str, Any]) -> str:
    """The Markdown that ``template`` makes of ``values``.

    These lose their line breaks and get backslashes where Markdown would see a sign of its own; what the template marks
    as ``safe`` stays as it is. Inside the template ``plain`` is a filter that does the same (for lists), and ``fence``
    makes the backticks that hold a text.
    """
    environment = _environment(package, autoescape=False)
    environment.finalize = _plain
    environment.filters |= {"plain": _plain, "fence": _fence}
    return environment.get_template(template).render(values)


def _environment(package: str, *, autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _plain(value: object) -> Markup:
    """Text that cannot end a table cell, a line, or its markup."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"\s+", " ", str(value))
    return Markup(re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text))


def _fence(text: object) -> Markup:
    """Backticks enough to hold ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", str(text))), default=0)
    return Markup("`" * max(3, longest + 1))

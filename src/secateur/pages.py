"""Pages and cards from templates. Every value is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup


def html_page(package: str, template: str, values: Mapping[str, Any]) -> str:
    """The HTML of ``template``, a file in ``package``, with ``values``; all values are escaped."""
    return _environment(package, autoescape=True).get_template(template).render(values)


def markdown_page(package: str, template: str, values: Mapping[str, Any]) -> str:
    """The Markdown of ``template`` with ``values``.

    Line breaks are removed from values, and characters with a meaning in Markdown get backslashes. Values that the
    template marks as ``safe`` are not changed. In the template, the filter ``plain`` does the same (for lists), and
    ``fence`` gives backticks that enclose a text.
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
    """Enough backticks to enclose ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", str(text))), default=0)
    return Markup("`" * max(3, longest + 1))

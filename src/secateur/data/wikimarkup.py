"""Extracts prose from Wikipedia's markup: whole paragraphs of running text; everything else is dropped."""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_TAG = re.compile(
    r"<(ref|gallery|math|timeline|score|code|source|syntaxhighlight|table|imagemap|poem|sub|sup)\b[^<>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INNERMOST_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:|//)[^\s\]]*\s*([^\]]*)\]")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$")
_EMPTY_BRACKETS = re.compile(r"\s*[(\[][\s,;:–—-]*[)\]]")
_BRACKET_START = re.compile(r"\(\s*[,;:]?\s+|\(\s*[,;:]\s*")
_BRACKET_END = re.compile(r"\s*[,;:]\s*\)")
_SPACE_BEFORE = re.compile(r"\s+([,.;:!?)])")
_BLANK = re.compile(r"[ \t\u00a0]+")

_NAMESPACES = ("file:", "image:", "category:", "media:")
_LAST_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "bibliography", "sources", "footnotes",
    "citations", "works cited", "notes and references",
}  # fmt: skip
_SHORTEST_PARAGRAPH = 160
_TEMPLATE_GAP = "\x00"
"""Replaces a template; a sentence with a template inside may lack a word."""


def prose(markup: str) -> str:
    """The paragraphs of an article, one blank line between them; empty when there are none worth reading.

    Headings, lists, tables, references, formulas, captions and boxes are dropped, and so is every sentence with a
    template (it may lack a number or a word).
    """
    text = _DROPPED_TAG.sub(_gap_of_tag, _COMMENT.sub("", html.unescape(markup)))
    text = _until_stable(_INNERMOST_TEMPLATE, _template, text)
    text = _until_stable(_INNERMOST_TABLE, lambda match: "", text)
    text = _until_stable(_INNERMOST_LINK, _link, text)
    text = _TAG.sub("", _WEB_LINK.sub(r"\1", text))
    text = _QUOTES.sub("", html.unescape(text))
    return "\n\n".join(_paragraphs(text))


def _until_stable(pattern: re.Pattern[str], replace: object, text: str) -> str:
    """Replace innermost matches until none is left: nesting comes apart from the inside."""
    changed = 1
    while changed:
        text, changed = pattern.subn(replace, text)  # type: ignore[call-overload]
    return text


def _gap_of_tag(match: re.Match[str]) -> str:
    return "" if match[1].lower() in ("ref", "gallery", "table", "timeline", "imagemap") else _TEMPLATE_GAP


def _template(match: re.Match[str]) -> str:
    """The replacement of a template: its text if that is plain, else a gap."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name, plain = name.lower(), [argument for argument in arguments if "=" not in argument]
    if name in ("convert", "cvt") and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if name in ("lang", "transl", "transliteration") and plain:
        return plain[-1]
    if name in ("nowrap", "nobr", "abbr", "ill", "formatnum") and plain:
        return plain[0]
    if name == "as of" and plain:
        return f"as of {plain[0]}"
    if name in ("spaced ndash", "snd", "spnd"):
        return " – "
    if name.startswith(
        ("sfn", "cite", "citation", "harv", "cn", "fact", "rp", "efn", "refn", "r|", "clarify", "who", "when")
    ):
        return ""
    return _TEMPLATE_GAP


def _link(match: re.Match[str]) -> str:
    target, *shown = match[1].split("|")
    if target.strip().lower().startswith(_NAMESPACES) or re.match(r"^[a-z-]{2,12}:\S", target):
        return ""
    return (shown[-1] if shown else target).strip(" ")


def _paragraphs(text: str) -> list[str]:
    kept: list[str] = []
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading:
            if heading[1].lower() in _LAST_SECTIONS:
                break
            continue
        if line[:1] in ("*", "#", ":", ";", "|", "!", " ", "{", "}"):
            continue
        paragraph = _tidy(" ".join(_whole_sentences(line)))
        if len(paragraph) >= _SHORTEST_PARAGRAPH and paragraph[-1] in ".!?\"”')":
            kept.append(paragraph)
    return kept


def _whole_sentences(line: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", line.strip(_TEMPLATE_GAP + " "))
    return [
        sentence for sentence in sentences if not any(mark in sentence for mark in (_TEMPLATE_GAP, "[[", "]]", "|"))
    ]


def _tidy(text: str) -> str:
    text = _BLANK.sub(" ", text)
    for pattern, replacement in (
        (_BRACKET_START, "("),
        (_BRACKET_END, ")"),
        (_EMPTY_BRACKETS, ""),
        (_SPACE_BEFORE, r"\1"),
    ):
        text = pattern.sub(replacement, text)
    return text.strip()

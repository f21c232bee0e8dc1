"""The marks that a tokenizer puts around every text by itself, such as BOS before it and EOS after it.

They are found by encoding a text, because names are not reliable: GPT-2 names a BOS that it never adds, and GLM adds
two tokens of which none is called BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from secateur.errors import DataError

_PROBES = ("a", "the", "1", ".", "\n")
"""Texts for this test; the first one that gives any tokens is used."""


@dataclass(frozen=True)
class Marks:
    """Token ids before and after a text; both are empty for a tokenizer that adds none."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that ``tokenizer`` adds to a text; raises DataError when it cannot encode any."""
    for probe in _PROBES:
        marked, plain = (_call(tokenizer, [probe], special)[0] for special in (True, False))
        if plain:
            return _around(marked, plain, frozenset(tokenizer.all_special_ids))
    return Marks()


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, marks: Marks) -> list[list[int]]:
    """Token ids of each text without ``marks``, which are those of ``tokenizer``; raises DataError.

    Marks that a text itself contains (from a chat template) are kept: they are part of it.
    """
    rows = _call(tokenizer, list(texts), True) if texts else []
    return [_without(row, marks) for row in rows]


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    try:
        rows = tokenizer(texts, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    except Exception as error:  # TypeError for broken settings, bare Exception from tokenizers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"The tokenizer cannot turn text into tokens ({reason[:200]}). Check tokenizer_config.json in its folder."
        ) from error
    return [list(row) for row in rows]


def _around(marked: list[int], plain: list[int], special: frozenset[int]) -> Marks:
    """The tokens of ``marked`` before and after ``plain``, the same text without marks."""
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return Marks(tuple(marked[:start]), tuple(marked[start + len(plain) :]))
    inside = [place for place, token in enumerate(marked) if token not in special]  # marks changed the text's tokens
    return Marks(tuple(marked[: inside[0]]), tuple(marked[inside[-1] + 1 :])) if inside else Marks()


def _without(row: list[int], marks: Marks) -> list[int]:
    before, after = len(marks.before), len(marks.after)
    if tuple(row[:before]) == marks.before:
        row = row[before:]
    if after and tuple(row[-after:]) == marks.after:
        row = row[:-after]
    return row

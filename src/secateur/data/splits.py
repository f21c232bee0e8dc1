"""The split of a document. It depends on the text alone, therefore a document is never in two splits."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

Split = Literal["calibration", "recovery", "evaluation"]

SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: dict[Split, float] = {"calibration": 0.15, "recovery": 0.70, "evaluation": 0.15}
"""Expected share of the documents of every source."""


def fingerprint(text: str) -> bytes:
    """SHA-256 of the text without regard to case and white space: equal for copies of a document in any source."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).digest()


def split_of(text: str) -> Split:
    """The split of a document: the same in every run, on every machine and in every source."""
    position = int.from_bytes(fingerprint(text)[:8], "big") / 2**64
    for split in SPLITS[:-1]:
        position -= SHARES[split]
        if position < 0:
            return split
    return SPLITS[-1]

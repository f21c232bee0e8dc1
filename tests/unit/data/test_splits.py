"""No document is ever in two splits, whatever the source, the settings or the seed."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from secateur.data import SHARES, SOURCES, SPLITS, TextSettings, load_blocks, split_of
from secateur.data.blocks import pieces_of_split
from secateur.data.builtin import read_builtin
from secateur.data.splits import fingerprint
from secateur.testing.tokenizer import tiny_tokenizer

INSTALLED = [name for name, source in SOURCES.items() if source.folder is not None]


def documents(count: int) -> list[str]:
    return [f"Document number {index} says {index * 7919 % 1000} things. " * 4 for index in range(count)]


def test_every_document_has_one_split_and_the_shares_hold() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    splits = [split_of(document) for document in documents(4000)]
    for split in SPLITS:
        assert splits.count(split) / 4000 == pytest.approx(SHARES[split], abs=0.03)


def test_copies_have_the_same_split() -> None:
    assert fingerprint("A  Line\n of text ") == fingerprint("a line of TEXT")
    for document in documents(50):
        assert split_of(document) == split_of(" \n" + document.upper().replace(" ", "\t  "))


@pytest.mark.parametrize("name", ["wikipedia", "news", "python-docs", "python-code"])
def test_the_splits_of_the_built_in_sources_share_nothing(name: str) -> None:
    if name not in INSTALLED:
        pytest.skip(f"the package of {name} is not installed")
    from random import Random

    read = {
        split: {piece.text for piece in pieces_of_split(read_builtin(name), split, 10**9, set(), Random(0))}
        for split in SPLITS
    }
    assert all(read.values())
    for one, other in combinations(SPLITS, 2):
        assert not {fingerprint(text) for text in read[one]} & {fingerprint(text) for text in read[other]}
    whole = {paragraph for text in read["evaluation"] for paragraph in text.split("\n\n") if len(paragraph) > 300}
    for split in ("calibration", "recovery"):
        assert not whole & {paragraph for text in read[split] for paragraph in text.split("\n\n")}


def test_copies_in_other_files_do_not_cross(tmp_path: Path) -> None:
    """The same documents under two names, one of them reformatted, and twice in one file."""
    originals = documents(400)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(json.dumps({"text": text}) for text in originals + originals[:50]))
    second.write_text("\n".join(json.dumps({"text": text.upper() + "\n"}) for text in reversed(originals)))
    tokenizer = tiny_tokenizer()
    seen: dict[str, set[str]] = {}
    for split, path, seed in (("calibration", first, 0), ("recovery", second, 1), ("evaluation", first, 2)):
        settings = TextSettings(text=[str(path)], window=16, tokens=2048)
        blocks = load_blocks(settings, split, tokenizer, seed)
        text = " | ".join(tokenizer.decode(block) for block in blocks.ids).lower()
        numbers = {part.split(" ")[0] for part in text.split("number ")[1:]}
        seen[split] = {number for number in numbers if number.isdigit()}
    # a number may be cut at a block's edge, so compare against the documents that truly are in the split
    for split, numbers in seen.items():
        allowed = {str(index) for index, text in enumerate(originals) if split_of(text) == split}
        assert len(numbers & allowed) > 5
        assert all(any(whole.startswith(number) for whole in allowed) for number in numbers)


def test_a_copy_is_used_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents(100) * 2))
    other = tmp_path / "again.jsonl"
    other.write_text(path.read_text())
    from random import Random

    from secateur.data.sources import read_documents

    seen: set[bytes] = set()
    pieces = pieces_of_split(read_documents(str(path), tiny_tokenizer()), "recovery", 10**9, seen, Random(0))
    assert len(pieces) == len({piece.text for piece in pieces}) == len(seen)
    assert not pieces_of_split(read_documents(str(other), tiny_tokenizer()), "recovery", 10**9, seen, Random(0))

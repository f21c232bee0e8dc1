"""Packing documents into windows, and mixing windows of several sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from secateur.data import TextSettings, TokenBlocks, document_end, load_blocks, read_ids, split_of
from secateur.data.blocks import Packer, Piece, cut, encode
from secateur.errors import DataError
from secateur.testing.tokenizer import tiny_tokenizer


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, str]:
    """Three sources of very different sizes: about 56,000, 56,000 and 1,100 characters for recovery."""
    paths = {}
    for name, count in (("apples", 1000), ("pears", 1000), ("plums", 20)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{name} {index} " * 8}) for index in range(count)))
        paths[name] = str(path)
    return paths


def settings(corpora: dict[str, str], **more: object) -> TextSettings:
    return TextSettings.model_validate({"text": list(corpora.values()), "window": 32, "tokens": 9600} | more)


def test_exactly_as_many_blocks_as_asked_for(corpora: dict[str, str]) -> None:
    blocks = load_blocks(settings(corpora, tokens=9630), "recovery", tiny_tokenizer(), 0)
    assert blocks.ids.shape == (300, 32)
    assert blocks.ids.dtype == torch.int64
    assert len(blocks.sources) == len(blocks) == 300
    assert sum(len(blocks.of_source(name)) for name in blocks.names) == 300
    assert torch.equal(torch.cat(list(blocks.batches(7))), blocks.ids)


def test_a_block_holds_text_of_its_source_only(corpora: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    blocks = load_blocks(settings(corpora), "recovery", tokenizer, 0)
    words = {path: name for name, path in corpora.items()}
    for ids, source in zip(blocks.ids, blocks.sources, strict=True):
        text = tokenizer.decode(ids)
        assert all(words[source] in text or name not in text for name in corpora)
        assert not any(name in text for name in corpora if name != words[source])


def test_equal_shares_and_a_small_source_gives_what_it_has(corpora: dict[str, str]) -> None:
    counts = Counter(load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 0).sources)
    assert 0 < counts[corpora["plums"]] < 50
    assert abs(counts[corpora["apples"]] - counts[corpora["pears"]]) <= 1


def test_written_weights_are_kept_exactly_or_refused(corpora: dict[str, str]) -> None:
    two = {name: corpora[name] for name in ("apples", "pears")}
    weights = {two["apples"]: 3.0, two["pears"]: 1.0}
    counts = Counter(load_blocks(settings(two, weights=weights), "recovery", tiny_tokenizer(), 0).sources)
    assert counts == {two["apples"]: 225, two["pears"]: 75}
    greedy = dict.fromkeys(corpora.values(), 1.0)
    with pytest.raises(DataError, match=r"plums.jsonl [\d,]+"):
        load_blocks(settings(corpora, weights=greedy), "recovery", tiny_tokenizer(), 0)


def test_the_seed_decides_everything(corpora: dict[str, str]) -> None:
    first = load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 3)
    again = load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 3)
    other = load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 4)
    assert torch.equal(first.ids, again.ids)
    assert first.sources == again.sources
    assert not torch.equal(first.ids, other.ids)


def test_too_little_text_says_how_much_there_is(corpora: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"Too little text for calibration: 999,999 tokens.*apples.jsonl \d+,\d+"):
        load_blocks(settings(corpora, tokens=999_999), "calibration", tiny_tokenizer(), 0)


def test_no_tokenizer_is_an_error() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        load_blocks(TextSettings(text=["python-docs"]), "recovery", None, 0)


def test_own_text_is_a_source_of_its_own() -> None:
    own = [f"The model wrote line {index}. " * 3 for index in range(200)]
    wanted = TextSettings(text=["self"], window=16, tokens=640)
    blocks = load_blocks(wanted, "recovery", tiny_tokenizer(), 0, own_text=own)
    assert set(blocks.sources) == {"self"}
    with pytest.raises(DataError, match="write_own_text"):
        load_blocks(wanted, "recovery", tiny_tokenizer(), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": []}, "at least one"),
        ({"text": ["news", "news"]}, "only once"),
        ({"tokens": 100, "window": 512}, "at least one window"),
        ({"text": ["news"], "weights": {"new": 1.0}}, "positive number"),
        ({"text": ["news"], "weights": {"news": 0.0}}, "positive number"),
        ({"window": 1}, "greater than or equal to 2"),
        ({"widnow": 64}, "Extra inputs"),
    ],
)
def test_settings_refuse_nonsense(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextSettings.model_validate(wrong)


def test_one_source_may_be_written_without_a_list() -> None:
    assert TextSettings.model_validate({"text": "news"}).text == ["news"]


def test_cutting_keeps_every_character() -> None:
    document = "\n\n".join(f"Paragraph {index}. " + "word " * 40 for index in range(50))
    pieces = cut(document, size=1000)
    assert "".join(piece.text for piece in pieces) == document
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(1000 <= len(piece.text) < 1300 for piece in pieces[:-1])
    assert cut("short", size=1000) == [Piece("short", True)]


def test_documents_end_with_the_mark_and_begin_as_the_tokenizer_begins_them() -> None:
    pieces = [Piece("ab", False), Piece("c", True), Piece("de", True)]
    packed = Packer(pieces, tiny_tokenizer(add_bos=True), window=10).take(1)[0]
    a, b, c, d, e = tiny_tokenizer().convert_tokens_to_ids(list("abcde"))
    assert packed.tolist() == [1, a, b, 1, c, 2, 1, d, e, 2]


def test_a_bos_that_the_chat_template_spells_out_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    assert encode(["<s>a", "a"], tokenizer)[0] == encode(["<s>a", "a"], tokenizer)[1]


def test_the_mark_of_pretraining_wins_over_the_end_of_a_turn() -> None:
    tokenizer = tiny_tokenizer()
    assert document_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    assert document_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>") != tokenizer.eos_token_id


def test_only_as_much_as_needed_is_encoded() -> None:
    pieces = [Piece("word " * 20, True)] * 1000
    packer = Packer(pieces, tiny_tokenizer(), window=10)
    assert packer.available(3) == 3
    assert packer.tokens < 10_000
    assert packer.available(10**6) == packer.tokens // 10 == 1000 * 101 // 10


def test_a_file_is_read_as_one_string(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij\n\nklmnop")
    tokenizer = tiny_tokenizer()
    ids = read_ids(path, tokenizer, window=4)
    assert tokenizer.decode(ids.flatten()) == "abcdefghij\n\nklmn"
    assert ids.shape == (4, 4)
    assert read_ids(path, tokenizer, window=4, max_tokens=11).shape == (2, 4)
    with pytest.raises(DataError, match="18 tokens"):
        read_ids(path, tokenizer, window=64)
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_ids(tmp_path / "missing.txt", tokenizer)


def test_token_blocks_refuse_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="one source per block"):
        TokenBlocks(torch.zeros(2, 4, dtype=torch.int64), ("a",))
    with pytest.raises(DataError, match="int64"):
        TokenBlocks(torch.zeros(1, 4), ("a",))


def test_splits_of_one_source_share_no_window(corpora: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    one = {"apples": corpora["apples"]}
    for split in ("calibration", "recovery", "evaluation"):
        blocks = load_blocks(settings(one, tokens=1600), split, tokenizer, 0)
        for ids in blocks.ids:
            inner = tokenizer.decode(ids).split("</s>")[1:-1]  # documents that lie wholly inside a block
            assert all(split_of(text) == split for text in inner if text.strip())

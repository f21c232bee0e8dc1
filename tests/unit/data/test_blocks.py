"""Packing documents into windows, and mixing windows of several sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur import progress
from secateur.data import (
    TextSettings,
    TokenBlocks,
    check_sources,
    check_window,
    document_end,
    load_blocks,
    load_whole,
    mixture,
    read_ids,
    read_texts,
    split_of,
)
from secateur.data.blocks import Packer, Piece, check_ids, cut_document
from secateur.data.mixture import context_of
from secateur.data.own_text import write_own_text
from secateur.errors import DataError, InputError
from secateur.evaluation import perplexity
from secateur.testing.tiny import build
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


def test_a_small_text_is_used_up_and_that_is_said(corpora: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(mixture, "say", said.append)
    enough = load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 0)
    assert len(enough) == 300
    assert not said
    all_of_it = load_blocks(settings(corpora, tokens=999_999), "recovery", tiny_tokenizer(), 0)
    assert 300 < len(all_of_it) < 999_999 // 32
    assert len(all_of_it) == len(load_blocks(settings(corpora, tokens=10**7), "recovery", tiny_tokenizer(), 0))
    assert len(said) == 2
    assert f"{len(all_of_it) * 32:,} tokens" in said[0]
    assert "less than the 999,999 asked for" in said[0]


@pytest.mark.parametrize("tokens", [9600, 32])
def test_a_source_of_which_nothing_is_read_is_named(
    tokens: int, corpora: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either its only document fell to another split, or there are fewer windows than sources."""
    text = next(text for text in map("one long record {} ".format, range(99)) if split_of(text * 99) != "recovery") * 99
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    named = {"apples": corpora["apples"], "one": str(tmp_path / "one.jsonl")}
    progress.show()
    try:
        blocks = load_blocks(settings(named, tokens=tokens), "recovery", tiny_tokenizer(), 0)
        assert blocks.names == (named["apples"],)
        assert f"Nothing is read of {named['one']} for recovery" in "".join(capsys.readouterr().err.splitlines())
        load_blocks(settings(corpora), "recovery", tiny_tokenizer(), 0)
        assert "Nothing is read" not in capsys.readouterr().err
    finally:
        progress.show(False)


@pytest.mark.parametrize(("text", "wanted"), [(8, 100), (7, 7), (1, 1)])
def test_few_windows_are_enough_where_few_were_asked_for(text: int, wanted: int) -> None:
    blocks = load_blocks(own(wanted), "recovery", tiny_tokenizer(), 0, own_text=[document(text)])
    assert len(blocks) == text


@pytest.mark.parametrize(("text", "wanted"), [(7, 100), (7, 8), (1, 2)])
def test_too_little_text_says_how_much_there_is(text: int, wanted: int) -> None:
    with pytest.raises(DataError, match=rf"Too little text for recovery: {wanted * 16:,} tokens.*self {text * 16:,}\."):
        load_blocks(own(wanted), "recovery", tiny_tokenizer(), 0, own_text=[document(text)])


def own(windows: int) -> TextSettings:
    return TextSettings(text=["self"], window=16, tokens=windows * 16)


def document(windows: int) -> str:
    """A document for recovery that fills so many windows of 16 characters, its end included."""
    texts = (f"{number:x}".rjust(windows * 16 - 1, "a") for number in range(100))
    return next(text for text in texts if split_of(text) == "recovery")


def test_files_are_measured_whole_and_sources_by_what_is_held_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    letters, records = tmp_path / "letters.txt", tmp_path / "records.jsonl"
    letters.write_text("abcdefgh " * 40)
    documents = [f"record {index} " * 4 for index in range(30)]
    records.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    chosen = TextSettings(text=[str(letters), str(records), "python-docs"], window=16, tokens=320)
    blocks = load_whole(chosen, tokenizer, 0)
    assert torch.equal(blocks.of_source(str(letters)).ids, read_ids(letters, tokenizer, window=16))
    whole = tokenizer.decode(blocks.of_source(str(records)).ids.flatten())
    joined = "".join(text + "</s>" for text in documents)
    assert joined.startswith(whole)
    assert len(joined) - len(whole) < 16 * len("</s>")
    alone = TextSettings(text=["python-docs"], window=16, tokens=320)
    held_out = load_blocks(alone, "evaluation", tokenizer, 0)
    assert torch.equal(blocks.of_source("python-docs").ids, held_out.ids)
    part = load_whole(chosen, tokenizer, 0, max_tokens=40)
    assert Counter(part.sources) == {str(letters): 2, str(records): 2, "python-docs": 20}
    with pytest.raises(DataError, match=r"records\.jsonl has \d+ tokens.*too few"):
        load_whole(TextSettings(text=[str(records)], window=5000, tokens=5000), tokenizer, 0)


def test_names_are_checked_before_anything_is_read() -> None:
    check_sources(TextSettings(text=["self", "python-docs", "owner/dataset"]))
    with pytest.raises(DataError, match="There is no text file"):
        check_sources(TextSettings(text=["self", "missing.txt"]))


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_a_window_longer_than_the_context_is_refused(family: str) -> None:
    model = build(family)
    check_window(TextSettings(window=64), model, "evaluation")
    with pytest.raises(InputError, match=r"recovery\.window = 65 .* 64 tokens\. Set recovery\.window to at most 64"):
        check_window(TextSettings(window=65), model, "recovery")


@pytest.mark.parametrize(("kind", "context"), [("roberta", 510), ("bert", 512), ("whisper", 448), ("xlnet", None)])
def test_contexts_that_are_not_what_the_config_calls_so(kind: str, context: int | None) -> None:
    """RoBERTa's positions begin after that of padding; XLNet says -1, as it has no longest."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    assert context_of(model) == context


def test_a_model_without_a_longest_context_takes_any_window() -> None:
    check_window(TextSettings(window=100_000, tokens=100_000), build("bloom"), "evaluation")


def test_no_tokenizer_is_an_error() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        load_blocks(TextSettings(text=["python-docs"]), "recovery", None, 0)


def test_own_text_is_a_source_of_its_own() -> None:
    written = [f"The model wrote line {index}. " * 3 for index in range(200)]
    wanted = TextSettings(text=["self"], window=16, tokens=640)
    blocks = load_blocks(wanted, "recovery", tiny_tokenizer(), 0, own_text=written)
    assert set(blocks.sources) == {"self"}
    with pytest.raises(DataError, match="write_own_text"):
        load_blocks(wanted, "recovery", tiny_tokenizer(), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": []}, "at least one"),
        ({"text": ["news", "news"]}, "only once"),
        ({"tokens": 100, "window": 512}, "at least one window"),
        ({"text": ["news"], "weights": {"new": 1.0}}, "nothing else"),
        ({"text": ["news"], "weights": {"news": 0.0}}, "positive"),
        ({"text": ["news"], "weights": {"news": float("inf")}}, "finite number"),
        ({"text": ["news"], "weights": {"news": float("nan")}}, "finite number"),
        ({"text": ["news", "wikipedia"], "weights": {"news": 1e308, "wikipedia": 1e308}}, "finite number"),
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
    pieces = cut_document(document, size=1000)
    assert "".join(piece.text for piece in pieces) == document
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(1000 <= len(piece.text) < 1300 for piece in pieces[:-1])
    assert cut_document("short", size=1000) == [Piece("short", True)]


def test_documents_end_with_the_mark_and_begin_as_the_tokenizer_begins_them() -> None:
    pieces = [Piece("ab", False), Piece("c", True), Piece("de", True)]
    packed = Packer(pieces, tiny_tokenizer(add_bos=True), window=10).take(1)[0]
    a, b, c, d, e = tiny_tokenizer().convert_tokens_to_ids(list("abcde"))
    assert packed.tolist() == [1, a, b, 1, c, 2, 1, d, e, 2]


def test_a_bos_that_the_chat_template_spells_out_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    spelt, plain = (Packer([Piece(text, True)], tokenizer, 3).take(1).tolist() for text in ("<s>a", "a"))
    assert spelt == plain


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


def test_what_another_purpose_took_is_read_last(corpora: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, taken = tiny_tokenizer(), set[str]()
    wanted = settings({"apples": corpora["apples"]}, tokens=1600)
    progress.show()
    try:
        first = load_blocks(wanted, "calibration", tokenizer, 0, taken=taken)
        assert torch.equal(first.ids, load_blocks(wanted, "calibration", tokenizer, 0).ids)
        second = load_blocks(wanted, "calibration", tokenizer, 0, taken=taken)
        assert not {tuple(ids.tolist()) for ids in first.ids} & {tuple(ids.tolist()) for ids in second.ids}
        assert capsys.readouterr().err == ""
        rest = load_blocks(wanted.model_copy(update={"tokens": 9600}), "calibration", tokenizer, 0, taken=taken)
        assert len(rest) > len(first) + len(second)
        assert "too little calibration text" in capsys.readouterr().err
    finally:
        progress.show(False)


def test_the_pieces_of_the_first_windows() -> None:
    pieces = [Piece(letter * 10, True) for letter in "abcdefgh"]
    packer = Packer(pieces, tiny_tokenizer(), window=11)  # as many tokens as characters, and one for the end
    assert packer.pieces(0) == []
    assert packer.pieces(1) == pieces[:1]
    assert packer.pieces(3) == pieces[:3]
    assert Packer(pieces, tiny_tokenizer(), window=12).pieces(3) == pieces[:4]
    assert packer.pieces(99) == pieces


def test_recovery_is_watched_on_other_text_than_calibration_reads(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(f"paragraph {index} " * 100 for index in range(100, 500)))
    text = TextSettings(text=[str(path)], window=16, tokens=4096)
    held_out = text.model_copy(update={"tokens": 512})
    found = read_texts(
        build("llama-gqa"), tiny_tokenizer(), {"validation": held_out, "calibration": text, "recovery": text}, seed=0
    )
    assert found.calibration is not None
    assert found.validation is not None
    assert len(found.validation) == 32
    windows = [{tuple(ids.tolist()) for ids in blocks.ids} for blocks in (found.calibration, found.validation)]
    assert not windows[0] & windows[1]
    alone = read_texts(build("llama-gqa"), tiny_tokenizer(), {"calibration": text}, seed=0)
    assert alone.calibration is not None
    assert torch.equal(alone.calibration.ids, found.calibration.ids)


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


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Characters of each text that tokenizers are given."""
    lengths: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def count(self: PreTrainedTokenizerFast, texts: list[str], **options: Any) -> Any:
        lengths.extend(map(len, texts))
        return call(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    return lengths


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_tokens_bound_what_is_read_of_a_file(
    suffix: str, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and one record, so that nothing but the tokens can end the reading."""
    for name in ("_WHOLE_UP_TO", "_LONGEST_PIECE", "_BATCH_CHARACTERS"):
        monkeypatch.setattr(f"secateur.data.blocks.{name}", 2_000)
    path, text = tmp_path / f"long{suffix}", "the letter came late " * 5_000
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        path.write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    tokenizer = tiny_tokenizer(add_bos=True)
    chosen = TextSettings(text=[str(path)], window=32, tokens=512)
    few = load_whole(chosen, tokenizer, 0, max_tokens=512)
    assert len(few) == 16
    assert sum(encoded) < 10_000
    assert torch.equal(few.ids, load_whole(chosen, tokenizer, 0).ids[:16])


def test_the_beginning_of_a_file_grows_until_it_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    monkeypatch.setattr("secateur.data.blocks._WHOLE_UP_TO", 100)
    monkeypatch.setattr("secateur.data.blocks._CHARACTERS_PER_TOKEN", 1)
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 500)
    tokenizer = tiny_tokenizer()
    whole = read_ids(path, tokenizer, window=10)
    encoded.clear()
    assert torch.equal(read_ids(path, tokenizer, window=10, max_tokens=150), whole[:15])
    assert [length for length in encoded if length > 5] == [150, 300]  # 64 tokens more than are used
    assert torch.equal(read_ids(path, tokenizer, window=10, max_tokens=10**9), whole)
    path.write_bytes(b"abcdefghij" * 10_000 + b"\xff")
    assert torch.equal(read_ids(path, tokenizer, window=10, max_tokens=20), whole[:2])
    with pytest.raises(DataError, match="not text in UTF-8"):
        read_ids(path, tokenizer, window=10)


def test_a_long_stretch_without_a_blank_line_is_cut_at_a_space() -> None:
    document = "word " * 100_000 + "x" * 300_000
    pieces = cut_document(document)
    assert "".join(piece.text for piece in pieces) == document
    assert all(piece.text.endswith(" ") for piece in pieces[:2])
    assert max(len(piece.text) for piece in pieces) <= 100_000


def test_tokens_without_a_row_are_refused_where_they_occur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    model, text = build("llama-gqa"), tmp_path / "text.jsonl"
    settings = TextSettings(text=[str(text)], window=16, tokens=640)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    text.write_text("\n".join(json.dumps({"text": f"number {i} " * 9}) for i in range(300)))
    read_texts(model, tokenizer, {"calibration": settings}, 0)  # what is never used does no harm
    text.write_text("\n".join(json.dumps({"text": f"number {i} <8> " * 9}) for i in range(300)))
    with pytest.raises(DataError, match=rf"tokenizer of {len(tokenizer)} tokens.*has 97 rows \(ids 0 to 96\)"):
        read_texts(model, tokenizer, {"calibration": settings}, 0)
    ids = torch.tensor([[5, 96], [7, 97]])
    with pytest.raises(DataError, match="up to id 97, and the model's embedding has 97 rows"):
        perplexity(model, ids)
    check_ids(ids[:1], model, "This")
    tokenizer.chat_template = "<8>{{ messages[0].content }}"
    with pytest.raises(DataError, match="A request that the model is to answer has tokens up to id"):
        write_own_text(model, tokenizer, 20, 0)

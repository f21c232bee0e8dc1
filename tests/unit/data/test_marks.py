"""Windows begin as the model expects: with what its tokenizer puts before a text, found by what it does to one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from secateur import pipeline
from secateur.config import load_recipe
from secateur.data import TextSettings, TokenBlocks, load_blocks, load_whole, read_ids, read_texts
from secateur.data.blocks import Packer, Piece, cut_document
from secateur.data.marks import Marks, marks_of
from secateur.data.own_text import write_own_text
from secateur.errors import DataError
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

TEXT = "the letter came late and nobody in the house had asked who wrote it. "


def marked(before: Sequence[str] = (), after: Sequence[str] = (), chat: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts these tokens before and after every text."""
    tokenizer = tiny_tokenizer(chat=chat)
    ids = [(token, int(tokenizer.convert_tokens_to_ids(token))) for token in {*before, *after}]
    template = " ".join([*before, "$A", *after])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


KINDS = {
    "none": (marked(), Marks()),
    "bos": (marked(["<s>"]), Marks((1,))),
    "bos and eos": (marked(["<s>"], ["</s>"]), Marks((1,), (2,))),  # Llama with add_eos_token; CLS and SEP
    "eos": (marked((), ["</s>"]), Marks((), (2,))),  # T5
    "bos is eos": (marked(["</s>"]), Marks((2,))),  # OPT
    "two": (marked(["<s>", "<unk>"]), Marks((1, 3))),  # GLM: [gMASK] <sop>
}
each = pytest.mark.parametrize("kind", KINDS)


@each
def test_the_marks_are_what_the_tokenizer_does(kind: str) -> None:
    tokenizer, marks = KINDS[kind]
    assert tokenizer.bos_token_id == 1  # all name a BOS, whether they add it or not
    assert marks_of(tokenizer) == marks


@each
def test_a_text_is_cut_into_windows_without_loss(kind: str, tmp_path: Path) -> None:
    tokenizer, marks = KINDS[kind]
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20)
    ids, many = read_ids(path, tokenizer, window=16), len(marks.before)
    assert torch.equal(ids[:, :many], torch.tensor(marks.before).repeat(len(ids), 1))
    text = tokenizer.decode(ids[:, many:].flatten())
    assert (TEXT * 20).startswith(text)
    assert len(TEXT * 20) - len(text) < 16
    assert torch.equal(read_ids(path, tokenizer, window=16, max_tokens=40), ids[:2])
    assert read_ids(path, tokenizer, window=many + 1, max_tokens=12).shape[1] == many + 1
    if many > 1:
        with pytest.raises(DataError, match=r"window of 2 has no room.*begins each with 2 tokens"):
            read_ids(path, tokenizer, window=2)


@each
def test_every_window_of_every_purpose_begins_with_them(kind: str, tmp_path: Path) -> None:
    tokenizer, marks = KINDS[kind]
    text, records = tmp_path / "text.txt", tmp_path / "records.jsonl"
    text.write_text("\n\n".join(f"{number} {TEXT * 3}" for number in range(400)))
    records.write_text("\n".join(json.dumps({"text": f"{number} {TEXT}"}) for number in range(200)))
    settings = TextSettings(text=[str(text), str(records)], window=16, tokens=1280)
    purposes = ("calibration", "repair", "reconstruct", "recovery", "instructions", "validation", "evaluation")
    found = read_texts(build("llama-gqa"), tokenizer, dict.fromkeys(purposes, settings), 0)
    for blocks in (*vars(found).values(), load_whole(settings, tokenizer, 0)):
        assert isinstance(blocks, TokenBlocks)
        assert blocks.marks == blocks.of_source(str(text)).marks == marks.before
        assert len(blocks) > 0
        assert all(tuple(row[: len(marks.before)].tolist()) == marks.before for row in blocks.ids)


def test_blocks_that_do_not_begin_with_their_marks_are_refused() -> None:
    with pytest.raises(DataError, match=r"begins with the marks \[1\]"):
        TokenBlocks(torch.tensor([[1, 5], [5, 1]]), ("a", "a"), (1,))


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("none", ["abcd", "efg</s>", "hi</s>j"]),
        ("bos", ["<s>abc", "<s>def", "<s>g</s><s>", "<s>hi</s>", "<s>jkl"]),  # no mark within a document, none twice
        ("bos and eos", ["<s>abc", "<s>def", "<s>g</s><s>", "<s>hi</s>", "<s>jkl"]),
        ("eos", ["abcd", "efg</s>", "hi</s>j"]),
        ("bos is eos", ["</s>abc", "</s>def", "</s>g</s>h", "</s>i</s>j", "</s>kl</s>"]),
        ("two", [f"<s><unk>{two}" for two in ("ab", "cd", "ef", "g</s>", "hi", "</s><s>", "jk", "l</s>")]),
    ],
)
def test_marks_stand_where_texts_begin_and_end(kind: str, rows: list[str]) -> None:
    tokenizer, _ = KINDS[kind]
    pieces = [Piece("abc", False), Piece("defg", True, False), Piece("hi", True), Piece("jkl", True)]
    assert [tokenizer.decode(row) for row in Packer(pieces, tokenizer, 4).take(99)] == rows


def test_parts_of_a_long_document_in_their_order_begin_no_text() -> None:
    document = "\n\n".join(TEXT * 30 for _ in range(20))
    assert [piece.first for piece in cut_document(document)] == [True] + [False] * (len(cut_document(document)) - 1)


def test_a_template_that_spells_out_the_marks_does_not_double_them() -> None:
    for kind, spelt in (("bos", "<s>"), ("two", "<s><unk>"), ("bos and eos", "<s>")):
        tokenizer, _ = KINDS[kind]
        texts = (f"{spelt}abc</s>", "abc")
        packed = [Packer([Piece(text, True)], tokenizer, 5).take(9).tolist() for text in texts]
        assert packed[0] == packed[1]


@pytest.mark.parametrize("chat", [False, True])
def test_the_model_writes_after_the_marks(chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr("secateur.data.own_text._WRITTEN_TOKENS", 6)
    monkeypatch.setattr("secateur.data.own_text._REQUESTS", ("Why {}?",))
    tokenizer, model = marked(["<s>", "<unk>"], ["</s>"], chat), build("llama-gqa")
    seen: list[torch.Tensor] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given["input_ids"]) or generate(**given))
    written = write_own_text(model, tokenizer, 400, 0)
    for row in seen[0]:
        prompt = row[row != tokenizer.pad_token_id].tolist()
        assert prompt[:2] == [1, 3]
        assert 2 not in prompt  # the end of a text is none of a request
    blocks = load_blocks(TextSettings(text=["self"], window=16, tokens=64), "recovery", tokenizer, 0, written)
    assert blocks.marks == (1, 3)


def test_a_tokenizer_that_cannot_encode_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = "x"  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"cannot turn text into tokens.*tokenizer_config\.json"):
        load_blocks(TextSettings(text=["python-docs"], window=16, tokens=64), "recovery", tokenizer, 0)


@pytest.mark.parametrize("method", ["fisher", "lorashear"])
def test_a_whole_run_reads_nothing_else(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} {TEXT * 3}" for number in range(300)))
    sections = ("calibration", "recovery", "evaluation")
    flags = {f"{name}.{key}": value for name in sections for key, value in
             (("text", str(text)), ("window", 26), ("tokens", 520))}  # fmt: skip
    flags |= {"evaluation.speed": False, "evaluation.baseline": None, "training.precision": "fp32", "method": method}
    flags |= {"recovery.steps": 2, "recovery.validation_tokens": 96}
    flags |= {"method.periods": 1, "method.period_steps": 2} if method == "lorashear" else {}
    firsts: list[int] = []
    forward = nn.Embedding.forward

    def watch(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if ids.dim() == 2 and ids.shape[1] == 26 and not ids.is_meta:
            firsts.extend(ids[:, 0].tolist())
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", watch)
    result = pipeline.prune(build("llama-gqa"), marked(["<s>"]), recipe=load_recipe(flags=flags))
    assert len(firsts) > 80
    assert set(firsts) == {1}
    assert result.metrics["windows"] == {"tokens": 26, "begin_with": ["<s>"], "stride": 25, "scored": 25}

"""Text that the model writes itself, with tiny models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from secateur.data import TextSettings, load_blocks, own_text
from secateur.data.own_text import write_own_text
from secateur.errors import DataError
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, and short texts: the tiny models have 64 positions."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(own_text, "_WRITTEN_TOKENS", 12)
    monkeypatch.setattr(own_text, "_BATCH", 8)
    monkeypatch.setattr(own_text, "_TOPICS", ("rain", "tea", "chess"))
    monkeypatch.setattr(own_text, "_REQUESTS", ("Explain {}.", "Why {}?"))
    return tmp_path / "cache"


def test_enough_text_and_the_same_again(small: Path) -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    state = torch.get_rng_state()
    first = write_own_text(model, tokenizer, 200, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(text.strip() for text in first)
    (file,) = small.iterdir()
    file.unlink()
    assert write_own_text(model, tokenizer, 200, 0) == first
    assert write_own_text(model, tokenizer, 200, 1) != first


def test_the_file_is_read_the_next_time_and_only_by_the_same_model(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    first = write_own_text(model, tokenizer, 100, 0)

    def refuse(*arguments: object) -> list[str]:
        raise AssertionError("written again")

    monkeypatch.setattr(own_text, "_write", refuse)
    assert write_own_text(model, tokenizer, 100, 0) == first
    with pytest.raises(AssertionError, match="written again"):
        write_own_text(build("llama-gqa", seed=1), tokenizer, 100, 0)


def test_a_chat_model_answers_requests() -> None:
    texts = write_own_text(build("llama-gqa"), tiny_tokenizer(chat=True), 100, 0)
    assert all(text.startswith(("user: Explain ", "user: Why ")) and "\nassistant: " in text for text in texts)


def test_a_cache_that_cannot_be_written_is_no_obstacle(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.parent.joinpath("file").touch()
    monkeypatch.setenv("SECATEUR_CACHE", str(small.parent / "file" / "below"))
    assert write_own_text(build("llama-gqa"), tiny_tokenizer(), 50, 0)


def test_the_mode_of_the_model_is_restored() -> None:
    model = build("llama-gqa").train()
    write_own_text(model, tiny_tokenizer(), 20, 0)
    assert model.training


def test_own_text_fills_blocks() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    texts = write_own_text(build("llama-gqa"), tokenizer, 1500, 0)
    blocks = load_blocks(TextSettings(text=["self"], window=16, tokens=320), "recovery", tokenizer, 0, texts)
    assert set(blocks.sources) == {"self"}
    assert len(blocks) == 20


def test_without_a_tokenizer_nothing_is_written() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        write_own_text(build("llama-gqa"), None, 20, 0)


@pytest.mark.parametrize("chat", [False, True])
def test_a_tokenizer_without_padding_gives_the_same_text(small: Path, chat: bool) -> None:
    """Llama's, Mistral's and GPT-2's have none; requests of unequal length are padded all the same."""
    model, tokenizer = build("llama-gqa"), tiny_tokenizer(chat=chat)
    first = write_own_text(model, tokenizer, 100, 0)
    shutil.rmtree(small)
    tokenizer.pad_token = None
    assert write_own_text(model, tokenizer, 100, 0) == first


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_no_text_is_longer_than_the_context(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions beyond a table of 64 end in an IndexError."""
    monkeypatch.setattr(own_text, "_WRITTEN_TOKENS", 256)
    assert write_own_text(build(family), tiny_tokenizer(), 100, 0)
    tokenizer = tiny_tokenizer(chat=True)
    assert write_own_text(build(family), tokenizer, 100, 0)
    monkeypatch.setattr(own_text, "_REQUESTS", ("Explain {} to a beginner who has never heard of it before.",))
    with pytest.raises(DataError, match=r"reads 64 tokens at once.*no room"):
        write_own_text(build(family), tokenizer, 100, 1)


def test_another_tokenizer_is_another_text() -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    keys = {own_text._key(model, tokenizer, 100, 0), own_text._key(model, tiny_tokenizer(chat=True), 100, 0)}
    tokenizer.eos_token = "<unk>"
    model.generation_config.eos_token_id = None
    keys.add(own_text._key(model, tokenizer, 100, 0))
    tokenizer.bos_token = "<unk>"
    keys.add(own_text._key(model, tokenizer, 100, 0))
    tokenizer.add_tokens(["tree"])
    keys.add(own_text._key(model, tokenizer, 100, 0))
    assert len(keys) == 5


def test_separators_of_lines_within_a_text_survive_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    texts = ["one\u2028two\u0085three", "four\x0bfive\x1csix\rseven\neight"]
    monkeypatch.setattr(own_text, "_write", lambda *arguments: texts)
    assert write_own_text(model, tokenizer, 20, 0) == texts
    monkeypatch.setattr(own_text, "_write", lambda *arguments: [])
    assert write_own_text(model, tokenizer, 20, 0) == texts


@pytest.mark.parametrize("damage", ["", '{"text": "cut', "[1]", '{"other": 1}', "\xff"])
def test_a_damaged_file_of_the_cache_is_written_anew(damage: str, small: Path) -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    first = write_own_text(model, tokenizer, 50, 0)
    (file,) = small.iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert write_own_text(model, tokenizer, 50, 0) == first
    assert file.stat().st_size > len(damage)

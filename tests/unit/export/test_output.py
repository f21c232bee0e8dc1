"""A place that cannot become a model folder is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.errors import InputError
from secateur.export import check_output


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"):
        check_output(tmp_path / "out")

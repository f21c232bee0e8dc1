"""What is written is there as a whole or not at all, and on the disk before it has its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.whole import beside, whole, write_whole


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append("renamed")
        replace(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are not known here")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", renamed)
    with whole(tmp_path / "out") as scratch:
        (scratch / "below").mkdir(parents=True)
        (scratch / "weights").write_text("1")
        (scratch / "below" / "plan").write_text("2")
    assert sorted(done[:4]) == [".out.saving", "below", "plan", "weights"]
    assert done[4:] == ["renamed", tmp_path.name]


@pytest.mark.parametrize("name", ["out", "z" * 255, "é" * 127])
def test_nothing_is_left_of_what_failed_and_what_was_there_stays(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    write_whole(file, "before")

    def fails() -> None:
        with whole(file) as scratch:
            scratch.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_text() == "before"


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole(tmp_path / "out") as scratch:
        scratch.mkdir()
        (scratch / "new").touch()
    with pytest.raises(OSError, match="not empty"), whole(tmp_path / "out") as scratch:
        scratch.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_names_beside_long_names_fit_and_differ() -> None:
    names = [beside(Path("é" * 126 + last), "saving").name for last in "ab"]
    assert all(len(name.encode()) <= 255 for name in names)
    assert len(set(names)) == 2

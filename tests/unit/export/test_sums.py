"""Whether a finished folder is as it was written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from secateur.errors import InputError
from secateur.export.sums import SUMS, check_sums, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    for name in ("model.safetensors", "below/plan.json", "a name with  gaps"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path, tmp_path / "below" / SUMS)
    return tmp_path


def test_what_is_as_it_was_written_passes_here_and_with_sha256sum(folder: Path) -> None:
    check_sums(folder, folder / "below" / SUMS)
    (folder / "added").write_text("by the user")
    check_sums(folder, folder / "below" / SUMS)
    done = subprocess.run(["sha256sum", "-c", f"below/{SUMS}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "below/plan.json", f"below/{SUMS}"])
@pytest.mark.parametrize("content", [None, "", "other", "\n", "null\n"])
def test_what_is_not_is_refused_by_name(name: str, content: str | None, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"{folder / name} is not as it was written"):
        check_sums(folder, folder / "below" / SUMS)

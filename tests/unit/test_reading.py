"""Files and names that are not ours end in one message, whatever is in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.config import parse_value
from secateur.errors import DataError, InputError
from secateur.reading import DEEPEST, parse_json, path_of, read_json, read_text


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "x" * 300, "~nobody-here-at-all/x", f"{'y' * 300}/z"])
def test_names_that_are_no_paths_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^The plan "):
        path_of(name, "The plan")


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="is no path"):
        path_of(tmp_path / "a")


def test_a_path_need_not_exist() -> None:
    assert path_of("~/nothing/here") == Path.home() / "nothing" / "here"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no /dev/zero")
def test_a_device_is_no_file() -> None:
    with pytest.raises(DataError, match="no ordinary file"):
        read_text(Path("/dev/zero"), error=DataError)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no ordinary file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested"),
        ("9" * 10_000, "digits"),
        ('{"a": ', "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_one_message(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        parse_json(text, "FILE", advice="Mend it.")
    assert str(caught.value).startswith("FILE ")
    assert str(caught.value).endswith("Mend it.")


def test_json_of_usual_depth_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1), encoding="utf-8-sig")
    assert read_json(file) is not None


def test_half_a_character_is_refused_before_it_must_be_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(r'{"method": "\ud83d", "seed": 0}')
    with pytest.raises(InputError, match=r"plan\.json holds half of a surrogate pair"):
        read_json(file)
    file.write_text(r'{"method": "\ud83d\ude00 \u2028", "seed": 0}')
    assert read_json(file) == {"method": "\U0001f600 \u2028", "seed": 0}
    with pytest.raises(InputError, match="seed holds half of a surrogate pair"):
        parse_value(r'"\ud83d"', "seed")


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_text(tmp_path / "a")

"""A folder that the tests of a file work in."""

from __future__ import annotations

from pathlib import Path

import pytest
from letters import write_letters

from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that reads characters, ``tiny``, and a text, ``letters.txt``."""
    place = tmp_path_factory.mktemp("place")
    tiny_tokenizer().save_pretrained(place / "tiny")
    build("llama-gqa").save_pretrained(place / "tiny")
    write_letters(place)
    return place

"""A tiny saved model, a copy of it that a test may damage, and a second look at everything that is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.loading import load, outline
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    build("llama-tied").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


NEEDS_WEIGHTS = re.compile(
    "Unknown dtype|Device .* cannot be used|no weights|computes something else than beside them|too little memory"
)
"""What ``outline`` cannot refuse: it needs no weights, puts nothing on a device, and computes nothing."""


@pytest.fixture(autouse=True)
def what_load_refuses_outline_refuses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every test of this folder, ``outline`` is asked too where ``load`` refuses, and must say the same."""

    def both(*name: str, **options: Any) -> Any:
        try:
            return load(*name, **options)
        except SecateurError as error:
            if not NEEDS_WEIGHTS.search(str(error)):
                options = {key: value for key, value in options.items() if key not in ("device", "dtype")}
                with pytest.raises(type(error), match=re.escape(str(error))):
                    outline(*name, **options)
            raise

    if hasattr(request.module, "load"):
        monkeypatch.setattr(request.module, "load", both)

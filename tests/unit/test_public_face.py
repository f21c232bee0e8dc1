"""The names that users may rely on, and that importing them costs nothing until one is used."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import secateur
from secateur.testing.tiny import TINY

NAMES = """Budget DependencyGraph PruningPlan Recipe Result SecateurError __version__
    apply_plan load load_recipe prune prune_ratios save trace""".split()


def test_the_public_names_are_these() -> None:
    assert sorted(secateur.__all__) == sorted(NAMES) == dir(secateur)


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(secateur, name)


def test_another_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        secateur.prun  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, secateur; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    # processor time, because another process may have the machine busy
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.3


def test_what_is_no_model_is_refused_in_one_sentence() -> None:
    import torch

    with pytest.raises(secateur.SecateurError, match="A str is not a model"):
        secateur.trace("smollm2-135m")  # type: ignore[arg-type]
    for wrong in ("smollm2-135m", torch.nn.Linear(2, 2)):
        with pytest.raises(secateur.SecateurError, match=f"A {type(wrong).__name__} is not a model of transformers"):
            secateur.prune(wrong)  # type: ignore[arg-type]
    with pytest.raises(secateur.SecateurError, match="Linear has no input embedding"):
        secateur.trace(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


NO_PATHS: list[Any] = [3, b"model", ["model"], object()]


@pytest.mark.parametrize("given", NO_PATHS)
def test_what_is_no_path_is_refused_in_one_sentence(given: Any) -> None:
    for read in (secateur.load_recipe, secateur.PruningPlan.load):
        with pytest.raises(secateur.SecateurError, match="Give the path of a file"):
            read(given)
    with pytest.raises(secateur.SecateurError, match=r"is no result\. Give what secateur\.prune returns"):
        secateur.save(given, "nowhere")


@pytest.mark.parametrize("kinds", [None, 3, "fnn", ["fnn"], [["ffn"]]])
def test_kinds_that_there_are_none_of_are_refused(kinds: Any) -> None:
    with pytest.raises(secateur.SecateurError, match=r"no kinds of groups\. Give a list of: ffn, attention"):
        secateur.trace(TINY["llama-gqa"](), kinds)


@pytest.mark.parametrize("given", [*NO_PATHS, "model"])
def test_what_is_no_tokenizer_is_refused(given: Any) -> None:
    with pytest.raises(secateur.SecateurError, match=r"is no tokenizer\. Give what secateur\.load returns"):
        secateur.prune(TINY["llama-gqa"](), given, method="magnitude")


def test_what_is_no_device_is_refused() -> None:
    for device in (None, [], 3.5):
        with pytest.raises(secateur.SecateurError, match=r"Device .* cannot be used here"):
            secateur.load("nowhere", device=device)  # type: ignore[arg-type]

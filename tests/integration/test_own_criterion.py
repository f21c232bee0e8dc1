"""The example of a criterion of one's own, on tiny models of which the experts' weights have three axes."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur
from secateur.testing.tiny import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_criterion.py"


@pytest.mark.parametrize("family", ["llama-odd", "qwen3-moe", "gpt2"])
def test_the_example_prunes_any_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    plan = secateur.prune(build(family), ratio=0.1, method="own_criterion:LargestWeight").plan
    assert plan.method == "own_criterion:LargestWeight"
    assert plan.ratio_reached == pytest.approx(0.1, abs=0.05)
    assert plan.parameters_after < plan.parameters_before

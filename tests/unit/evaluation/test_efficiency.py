"""Size and speed: counts are exact, and models are timed in turns."""

from __future__ import annotations

import json

import pytest

from secateur.evaluation import compare_speed, efficiency, parameter_count
from secateur.testing.tiny import build


def test_tied_parameters_count_once() -> None:
    model = build("llama-tied")
    count = parameter_count(model)
    assert count == sum(tensor.numel() for name, tensor in model.state_dict().items() if name != "lm_head.weight")


def test_every_model_is_timed_at_every_batch_size() -> None:
    models = {"dense": build("llama-gqa"), "small": build("llama-one-layer")}
    result = compare_speed(models, batch_sizes=(1, 2), prompt=8, written=2, repeats=2)
    for batch in ("batch 1", "batch 2"):
        assert list(result[batch]) == ["dense", "small"]
        for speed in result[batch].values():
            assert speed["prefill_tokens_per_s"] > 0
            assert speed["decode_tokens_per_s"] > 0
    assert result["settings"]["repeats"] == 2
    json.dumps(result)


def test_turns_alternate_and_the_first_only_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = build("llama-gqa"), build("llama-one-layer")
    order = []

    def turn(model: object, batch: int, prompt: int, written: int) -> tuple[float, float]:
        order.append("dense" if model is dense else "small")
        return (1e9, 1e9) if len(order) <= 2 else (float(len(order)), 1.0)

    monkeypatch.setattr(efficiency, "_one_turn", turn)
    result = compare_speed({"dense": dense, "small": small}, batch_sizes=(1,), repeats=3)
    assert order == ["dense", "small"] * 4
    assert result["batch 1"]["dense"]["prefill_tokens_per_s"] == 5.0  # the median of turns 3, 5 and 7
    assert result["batch 1"]["small"]["prefill_tokens_per_s"] == 6.0

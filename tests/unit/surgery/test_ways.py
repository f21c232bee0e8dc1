"""A cut is tried in every way in which the whole model answers, on copies that have not run, and NaN is never good."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.surgery import protect_failing, sharing_copy, verify_cuts
from secateur.surgery.ways import other_ways
from secateur.testing.tiny import TINY
from secateur.testing.zoo import build_any

VERIFY, STAND_IN = (importlib.import_module(f"secateur.surgery.{name}") for name in ("verify", "stand_in"))
EVERY = ["one token", "longer text", "padded text", "a cache"]


class _Numbered(LlamaForCausalLM):
    """Attention that reads the numbers of its config once: what is cut is not in them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(_Wrong(config), with_kwargs=True)
        self.post_init()


class _Wrong:
    """Fails in one way of asking when heads are gone."""

    now = ""

    def __init__(self, config: LlamaConfig) -> None:
        self.width = config.num_attention_heads * config.head_dim

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states, past = kwargs.get("hidden_states", args[0] if args else None), kwargs.get("past_key_values")
        asked = {
            "one token": states.shape[1] == 1 and past is None,
            "longer text": states.shape[1] > STAND_IN._WINDOW + 8,
            "a cache": states.shape[1] == 1 and past is not None,
        }
        if asked[self.now] and module.o_proj.in_features != self.width:
            raise RuntimeError(f"{module.o_proj.in_features} is not {self.width}")


@pytest.mark.parametrize("way", ["one token", "longer text", "a cache"])
def test_what_fails_in_one_way_only_is_protected(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(_Wrong, "now", way)
    model = _Numbered(TINY["llama-gqa"]().config).eval()
    graph = protect_failing(model, trace(model))
    assert f"RuntimeError on {way}: " in str(graph["layers.1.attention"].protected)
    assert graph["layers.1.mlp"].protected is None


def test_a_model_that_changes_itself_while_it_runs_is_cut_before_it_has_run() -> None:
    """BigBird builds other attention for short text, of the sizes in its config."""
    model, _ = build_any("big_bird")
    graph = secateur.trace(model, kinds=["hidden"])
    assert {group.kind for group in graph.prunable} == {"ffn"}
    assert "cutting it failed a check" in str(graph["layers.0.attention"].protected)
    small = secateur.prune(model, None, ratio=0.05, method="magnitude").model
    for length in (1, 7, 40):
        assert small(input_ids=torch.arange(2 * length).reshape(2, length)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "mistral", "gpt-oss", "opt"])
def test_every_way_is_open_to_an_ordinary_model(family: str) -> None:
    model = TINY[family]()
    ids = torch.arange(24).reshape(2, 12)
    assert list(other_ways(lambda: sharing_copy(model), ids)) == EVERY


def test_a_way_in_which_the_model_draws_numbers_is_none() -> None:
    """Two copies answer differently then, whatever is cut."""
    model = TINY["llama-gqa"]()

    def noisy(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output) if output.shape[1] > 12 else output

    def copied() -> Any:
        copy = sharing_copy(model)
        copy.model.layers[0].mlp.register_forward_hook(noisy)
        return copy

    ways = other_ways(copied, torch.arange(24).reshape(2, 12))
    assert list(ways) == [name for name in EVERY if name != "longer text"]


def test_windows_of_a_stand_in_are_shorter_than_a_long_text() -> None:
    config = TINY["mistral"]().config
    config.sliding_window, config.max_position_embeddings = 4096, 32768
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 4096,
        "factor": 8.0,
    }
    model = type(TINY["mistral"]())(config).eval()
    small: Any = STAND_IN.stand_in(model, trace(model))
    assert small.config.sliding_window == small.config.rope_parameters["original_max_position_embeddings"] == 8
    assert config.sliding_window == config.rope_parameters["original_max_position_embeddings"] == 4096
    assert all(check.ok for check in verify_cuts(small))


# --- what is not finite ----------------------------------------------------------------------------------------------


def _nan(model: Any) -> str:
    nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    return "model.layers.1.mlp.up_proj.weight"


def _overflow(model: Any) -> str:
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, 3e38)
    return "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("broken", [_nan, _overflow])
def test_a_model_that_is_not_finite_is_refused_by_the_place_in_which_it_begins(broken: Callable[[Any], str]) -> None:
    model = TINY["llama-gqa"]()
    place = broken(model)
    with pytest.raises(ModelError, match=f"computes NaN or infinity before anything is cut, first in {place}"):
        verify_cuts(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cut_that_makes_it_not_finite_is_no_good(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    slice_model = VERIFY.slice_model

    def broken(model: Any, graph: Any, kept: Any) -> None:
        slice_model(model, graph, kept)
        head = nn.Parameter(torch.full_like(model.lm_head.weight, value))
        model.lm_head.weight = head

    monkeypatch.setattr(VERIFY, "slice_model", broken)
    assert not any(check.ok for check in verify_cuts(TINY["llama-gqa"]()))


def test_a_replay_that_is_not_finite_is_no_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VERIFY, "_replayed", lambda *_: float("nan"))
    wrong = {check.group for check in verify_cuts(TINY["llama-gqa"]()) if not check.ok}
    assert wrong == {"all groups", "some groups"}

"""Stand-ins beyond each threshold: whatever the size of a model, the same groups may be cut."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.errors import ModelError
from secateur.export import standard_form
from secateur.graph import trace
from secateur.surgery import protect_failing, slice_model, verify_cuts
from secateur.surgery.narrower import in_step
from secateur.surgery.rebuild import is_listed
from secateur.surgery.stand_in import stand_in
from secateur.testing.zoo import Shape, build_any, build_type
from secateur.types import DependencyGraph, Kind

VERIFY, STAND_IN = (importlib.import_module(f"secateur.surgery.{name}") for name in ("verify", "stand_in"))

_COMMON: Mapping[str, Any] = {
    "vocab_size": 600,  # more than a stand-in has
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: Mapping[str, Any] = {**_COMMON, "intermediate_size": 640, "num_key_value_heads": 8}
WIDE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _GATED),
    "gemma2": ("gemma2", {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 640, "word_embed_proj_dim": 128}),
    "bloom": ("bloom", {"vocab_size": 600, "hidden_size": 128, "n_layer": 4, "n_head": 16}),
    "mixtral": ("mixtral", {**_GATED, "num_local_experts": 20, "num_experts_per_tok": 2}),
}
"""Families with widths that can be narrowed, and more layers than have one digit."""


def wide(name: str) -> PreTrainedModel:
    family, options = WIDE[name]
    config = AutoConfig.for_model(family, **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()


def uneven(model: PreTrainedModel, *kinds: Kind) -> PreTrainedModel:
    """What opens from the folder of ``model`` after cuts by layer, and by ``kinds`` as well.

    Without these a layer has one KV head, or head, left.
    """
    graph = trace(model).opened(kinds)
    kept = {}
    for group in graph.prunable:
        if group.kind == "ffn":
            kept[group.name] = list(range(group.size * 9 // (10 + (group.layer or 0))))
        elif group.kind == "attention" and group.layer in (1, 2) and not kinds:
            kept[group.name] = list(range(group.size - 1 if group.layer == 1 else 1))
        elif group.kind == "query" and group.layer == 1:
            kept[group.name] = list(range(0, group.size, 2))
        elif group.layer is None:
            kept[group.name] = list(range(group.size // 2))
    slice_model(model, graph, kept)
    form = standard_form(model, graph, kept)
    form.config._experts_implementation = "eager"
    return form.model_class(form.config).eval()


def both_sides(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> tuple[DependencyGraph, DependencyGraph]:
    """What may be cut by a stand-in as wide as the model, and by a narrow one, which must be there."""
    graph = trace(model)
    as_wide = protect_failing(model, graph)
    monkeypatch.setattr(STAND_IN, "NARROW_FROM", 0)
    monkeypatch.setattr(STAND_IN, "WIDE_UP_TO", 0)
    monkeypatch.setattr(VERIFY, "WHOLE_UP_TO", 0)
    return as_wide, protect_failing(model, graph)


@pytest.mark.parametrize("name", WIDE)
def test_a_narrow_stand_in_says_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = wide(name)
    one, two = both_sides(monkeypatch, model)
    assert one == two
    assert one.prunable
    assert all(check.ok for check in verify_cuts(model))
    small: Any = stand_in(model, one)
    assert small.num_parameters() < model.num_parameters() / 4
    assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", WIDE)
def test_so_it_does_of_layers_that_were_pruned_to_different_sizes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = uneven(wide(name))
    one, two = both_sides(monkeypatch, model)
    assert one == two
    assert one.prunable
    small: Any = stand_in(model, one)
    widths = {group.size for group in trace(small) if group.kind == "ffn"}
    assert len(widths) > 1
    assert max(widths) <= 416


def test_so_it_does_of_query_heads_that_went_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven(wide("llama"), "query")
    one, two = both_sides(monkeypatch, model)
    assert one == two
    assert one.prunable


@pytest.mark.parametrize("parts", [False, True])
def test_results_that_list_their_tensors_have_stand_ins(monkeypatch: pytest.MonkeyPatch, parts: bool) -> None:
    model = uneven(build_type("gemma3", Shape.draw(0, "joined")), "ffn") if parts else uneven(wide("gemma2"), "hidden")
    assert is_listed(model.config)
    one, two = both_sides(monkeypatch, model)
    assert one == two
    assert one.prunable
    assert all(check.ok and "on random weights and 2 layers" in check.message for check in verify_cuts(model))


def test_what_reads_pictures_has_one_layer_in_a_stand_in() -> None:
    model = build_type("gemma3", Shape.draw(0, "joined"))
    config = model.config
    config.vision_config.num_hidden_layers = 5
    model = type(model)(config).eval()
    small: Any = stand_in(model, trace(model))
    assert small.config.vision_config.num_hidden_layers == 1
    assert model.config.vision_config.num_hidden_layers == 5
    assert protect_failing(model, trace(model)).prunable


def test_what_cannot_have_a_tower_of_one_layer_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_type("gemma3", Shape.draw(0, "joined"))
    config = model.config
    config.vision_config.num_hidden_layers = 5
    model, graph = type(model)(config).eval(), trace(model)
    built = STAND_IN._on_meta

    def picky(family: Any, config: Any) -> Any:
        if config.vision_config.num_hidden_layers == 1:
            raise ModelError("too few layers")
        return built(family, config)

    monkeypatch.setattr(STAND_IN, "_on_meta", picky)
    small: Any = stand_in(model, graph)
    assert small.config.vision_config.num_hidden_layers == 5


@pytest.mark.parametrize("family", ["dots3_note_text", "gemma4_text"])
def test_a_family_whose_layers_differ_by_design_has_a_narrow_stand_in(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, _ = build_any(family)
    assert model.config.is_heterogeneous
    graph = trace(model)
    one = protect_failing(model, graph)
    monkeypatch.setattr(STAND_IN, "NARROW_FROM", 0)
    assert protect_failing(model, graph) == one


def test_what_is_too_wide_and_cannot_be_narrowed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama")
    for module, name in ((STAND_IN, "NARROW_FROM"), (STAND_IN, "WIDE_UP_TO"), (VERIFY, "WHOLE_UP_TO")):
        monkeypatch.setattr(module, name, 0)

    def refuse(config: object) -> None:
        raise AttributeError("no such size")

    monkeypatch.setattr(STAND_IN, "narrower", refuse)
    with pytest.raises(ModelError, match="No small model stands for this llama model: no such size"):
        protect_failing(model, trace(model))


def test_sizes_that_shrink_in_step_stay_apart() -> None:
    assert [in_step(size, 6144, 416) for size in (6144, 6143, 5000, 2, 1)] == [416, 415, 338, 2, 1]
    assert [in_step(size, 8, 2) for size in (8, 7, 4, 1)] == [2, 2, 2, 1]
    assert in_step(64, 4, 2) == 32  # a layer may have more by design
    assert in_step(7, 8, 8) == 7

"""Configs that list the tensors that are smaller: written when no other form will do, opened, and cut again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import ModelError
from secateur.export import standard_form
from secateur.export.huggingface import write
from secateur.export.verify import judge, open_folders
from secateur.graph import trace
from secateur.surgery import slice_model
from secateur.surgery.rebuild import is_listed
from secateur.testing.contracts import logits
from secateur.testing.tiny import TINY
from secateur.testing.zoo import Shape, build_type


def cut(model: Any, graph: Any, *kinds: str) -> dict[str, list[int]]:
    """Slice half of the units of every group of these kinds, one fewer in the second layer; what was kept."""
    graph = graph.opened(kinds)
    chosen = [group for group in graph if group.kind in kinds]
    kept = {group.name: list(range(max(1, group.size // 2 - (group.layer or 0)))) for group in chosen}
    slice_model(model, graph, kept)
    return kept


def test_a_width_that_scales_follow_survives_two_rounds(tmp_path: Path) -> None:
    model: Any = TINY["gemma2"]()
    model.config._name_or_path = ""
    graph = trace(model)
    kept = cut(model, graph, "hidden")
    first = write(model, None, tmp_path / "first", graph=graph, kept=kept)
    opened, _ = secateur.load(str(tmp_path / "first"), dtype="float32")
    assert is_listed(opened.config)
    assert opened.config.hidden_size == len(kept["hidden"])
    torch.testing.assert_close(logits(opened), logits(model))

    graph = trace(opened)
    kept = cut(opened, graph, "ffn", "attention")
    second = write(opened, None, tmp_path / "second", graph=graph, kept=kept)
    answers = open_folders([first, second])
    assert all(judge(*pair).logits_difference <= 1e-5 for pair in zip((first, second), answers, strict=True))
    assert judge(second, answers[1]).parameters == graph.parameter_count(kept)


def test_layers_that_differ_in_a_model_of_several_parts_are_listed() -> None:
    model = build_type("gemma3", Shape.draw(0, "joined"))
    graph = trace(model)
    kept = cut(model, graph, "ffn")
    config = standard_form(model, graph, kept).config
    assert is_listed(config)
    tensors = config.pruned_layers["tensors"]
    assert all(name.startswith("model.language_model.layers.") for name in tensors)
    assert config.pruned_layers["built_with"] == {}


def test_what_is_no_part_of_a_model_of_the_family_is_refused() -> None:
    model: Any = TINY["llama-gqa"]()
    graph = trace(model)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(2 * model.config.hidden_size))
    with pytest.raises(ModelError, match="cannot be described by a config"):
        standard_form(model, graph, {})

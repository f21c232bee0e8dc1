"""The modelling file in a folder: our own source, short, and free of secateur."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from secateur.surgery import pruned_layers
from secateur.surgery.rebuild import family_of, is_uneven, modeling_source, pruned_class
from secateur.testing.tiny import TINY


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-new", "gpt-neox"])
def test_it_imports_only_torch_and_transformers(name: str) -> None:
    family = type(TINY[name]())
    tree = ast.parse(modeling_source(family))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"copy", "typing", "torch", "transformers", "transformers.pytorch_utils"}
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes == ["PrunedLayers", f"Pruned{family.__name__}"]


def test_it_is_the_source_that_secateur_runs() -> None:
    written = ast.parse(modeling_source(type(TINY["llama-gqa"]())))
    ours = ast.parse(Path(pruned_layers.__file__).read_text())

    def of(tree: ast.Module) -> str:
        return next(ast.dump(node) for node in tree.body if getattr(node, "name", "") == "PrunedLayers")

    assert of(written) == of(ours)
    assert "type: ignore" not in modeling_source(type(TINY["llama-gqa"]()))


def test_it_can_be_read_in_two_minutes() -> None:
    lines = modeling_source(type(TINY["llama-gqa"]())).splitlines()
    assert len(lines) < 130
    assert max(map(len, lines)) <= 120


def test_the_class_is_the_familys_own() -> None:
    model = TINY["llama-gqa"]()
    made = pruned_class(type(model))
    assert issubclass(made, type(model))
    assert made.__name__ == "PrunedLlamaForCausalLM"
    assert family_of(model) is type(model)
    assert not is_uneven(model.config)


def test_every_causal_family_can_be_imported_from_transformers() -> None:
    """The template says ``from transformers import Family``."""
    import transformers

    for build in TINY.values():
        model: PreTrainedModel = build()
        assert getattr(transformers, type(model).__name__) is type(model)

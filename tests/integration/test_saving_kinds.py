"""Models without experts, layers, hidden dimensions, tokens or states open in a fresh process and compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.config import Recipe, revise
from secateur.errors import InputError
from secateur.export import save
from secateur.export.huggingface import write
from secateur.export.verify import judge, open_folders
from secateur.graph import trace
from secateur.surgery import slice_model
from secateur.surgery.verify import legal_units
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer

CASES = {
    "mixtral experts": ("mixtral", ("expert",), False),
    "mixtral everything": ("mixtral", ("ffn", "attention", "expert", "layer", "hidden", "vocab"), False),
    "llama layers and channels": ("llama-odd", ("layer", "ffn"), True),
    "gemma2 layers": ("gemma2", ("layer",), False),
    "qwen3 hidden": ("qwen3", ("ffn", "attention", "hidden"), False),
    "gemma2 hidden, whose width scales embeddings": ("gemma2", ("hidden",), False),
    "gpt2 hidden, whose width scales scores": ("gpt2", ("ffn", "attention", "hidden"), True),
    "tied vocabulary": ("llama-tied", ("vocab",), False),
}


def test_every_kind_opens_and_computes_the_same(tmp_path: Path) -> None:
    references, expected = [], []
    for name, (family, kinds, uneven) in CASES.items():
        torch.manual_seed(1)
        model: Any = TINY[family]()
        graph = trace(model).opened(kinds)  # type: ignore[arg-type]
        chosen = [group for group in graph.prunable if group.kind in kinds]
        kept = {
            g.name: legal_units(g, g.size // 2 + (n if uneven and not g.modules else 0)) for n, g in enumerate(chosen)
        }
        slice_model(model, graph, kept)
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        references.append(write(model, None, folder, graph=graph, kept=kept))
        expected.append(graph.parameter_count(kept))
    for reference, answer, parameters in zip(references, open_folders(references), expected, strict=True):
        verification = judge(reference, answer)
        assert verification.logits_difference <= 1e-5
        assert verification.dynamic_cache_difference is not None
        assert verification.parameters == parameters
    assert not judge(references[0], open_folders(references[:1])[0]).trust_remote_code


@pytest.mark.parametrize(
    ("family", "kinds", "method"),
    [
        ("mixtral", ["expert"], "magnitude"),
        ("llama-odd", ["layer"], "random"),
        ("qwen3", ["ffn", "attention", "hidden"], "magnitude"),
    ],
)
def test_a_run_cuts_what_the_budget_names(family: str, kinds: list[str], method: str) -> None:
    model = TINY[family]()
    recipe = revise(Recipe(), {"budget.kinds": kinds, "budget.floor": 0, "recovery.steps": 0})
    result = secateur.prune(model, ratio=0.25, method=method, recipe=recipe)
    assert {result.graph[name].kind for name in result.plan.kept} <= set(kinds)
    assert result.plan.kept
    assert "cannot_be_saved" not in result.metrics
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.parameters_after


def test_a_vocabulary_is_cut_without_a_tokenizer_only(tmp_path: Path) -> None:
    recipe = revise(Recipe(), {"budget.kinds": ["vocab"], "recovery.steps": 0})
    with pytest.raises(InputError, match="a tokenizer cannot follow"):
        secateur.prune(TINY["llama-gqa"](), tiny_tokenizer(), ratio=0.05, method="random", recipe=recipe)
    model = TINY["llama-gqa"]()
    graph, kept = trace(model), {"vocab": [0, 1, 2, 5, 96]}
    slice_model(model, graph, kept)
    with pytest.raises(InputError, match="another token"):
        save(model, tiny_tokenizer(), tmp_path / "refused", graph=graph, kept=kept)
    save(model, None, tmp_path / "out", graph=graph, kept=kept)
    assert json.loads((tmp_path / "out" / "secateur" / "tokens.json").read_text()) == [0, 1, 2, 5, 96]

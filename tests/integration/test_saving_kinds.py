"""Models without experts, layers, hidden dimensions, tokens or states open in a fresh process and compute the same."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.config import Recipe, revise
from secateur.errors import InputError
from secateur.export import save_folder
from secateur.export.adopt import adopt_config
from secateur.export.huggingface import write
from secateur.export.verify import judge, open_folders
from secateur.graph import trace
from secateur.surgery import slice_model
from secateur.surgery.verify import legal_units
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.testing.zoo import Shape, build_type
from secateur.types import Kind

CASES = {
    "mixtral experts": ("mixtral", ("expert",), False),
    "mixtral everything": ("mixtral", ("ffn", "attention", "expert", "layer", "hidden", "vocab"), False),
    "llama layers and channels": ("llama-odd", ("layer", "ffn"), True),
    "gemma2 layers": ("gemma2", ("layer",), False),
    "qwen3 hidden": ("qwen3", ("ffn", "attention", "hidden"), False),
    "gemma2 hidden, whose width scales embeddings": ("gemma2", ("hidden",), False),
    "gpt2 hidden, whose width scales scores": ("gpt2", ("ffn", "attention", "hidden"), True),
    "tied vocabulary": ("llama-tied", ("vocab",), False),
    "query heads": ("llama-odd", ("query",), False),
    "query heads and channels": ("phi3", ("ffn", "query"), True),
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
        ("llama-odd", ["ffn", "query"], "random"),
    ],
)
def test_a_run_cuts_what_the_budget_names(family: str, kinds: list[str], method: str) -> None:
    model = TINY[family]()
    recipe = revise(Recipe(), {"budget.kinds": kinds, "budget.floor": 0, "recovery.steps": 0})
    result = secateur.prune(model, ratio=0.25, method=method, recipe=recipe)
    assert {result.graph[name].kind for name in result.plan.kept} <= set(kinds)
    assert result.plan.kept
    assert result.unsavable is None
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.parameters_after


def test_a_vocabulary_is_cut_without_a_tokenizer_only(tmp_path: Path) -> None:
    recipe = revise(Recipe(), {"budget.kinds": ["vocab"], "recovery.steps": 0})
    with pytest.raises(InputError, match="a tokenizer cannot follow"):
        secateur.prune(TINY["llama-gqa"](), tiny_tokenizer(), ratio=0.05, method="random", recipe=recipe)
    model = TINY["llama-gqa"]()
    graph, kept = trace(model), {"vocab": [0, 1, 2, 5, 96]}
    slice_model(model, graph, kept)
    with pytest.raises(InputError, match="no longer match this tokenizer"):
        save_folder(model, tiny_tokenizer(), tmp_path / "refused", graph=graph, kept=kept)
    save_folder(model, None, tmp_path / "out", graph=graph, kept=kept)
    assert json.loads((tmp_path / "out" / "secateur" / "tokens.json").read_text()) == [0, 1, 2, 5, 96]


ROUNDS: dict[str, list[tuple[Kind, list[int]]]] = {  # of layers with 3 KV heads of 3 query heads
    "KV heads, then query heads": [("attention", [3, 2]), ("query", [3, 2])],
    "query heads, then KV heads": [("query", [6, 9]), ("attention", [2, 1])],
    "query heads twice": [("query", [6, 9]), ("query", [3, 6])],
    "one after the other": [("query", [6, 9]), ("attention", [2, 3]), ("query", [2, 6])],
    "all layers alike, then not": [("query", [6, 6]), ("attention", [2, 3])],
}


def test_query_heads_and_kv_heads_go_in_rounds(tmp_path: Path) -> None:
    references = []
    for number, (model_type, rounds) in enumerate(product(("llama", "phi3"), ROUNDS.values())):
        torch.manual_seed(number)
        model: Any = build_type(model_type, Shape(heads=9, kv_heads=3, head_dim=8, hidden=72))
        for last, (kind, counts) in enumerate(rounds, start=1):
            graph = trace(model).opened([kind])
            groups = [group for group in graph.prunable if group.kind == kind]
            kept = {group.name: legal_units(group, count) for group, count in zip(groups, counts, strict=True)}
            slice_model(model, graph, kept)
            if last < len(rounds):
                adopt_config(model, graph, kept)
        folder = tmp_path / str(number)
        folder.mkdir()
        references.append(write(model, None, folder, graph=graph, kept=kept))
        opened = secateur.load(str(folder))[0]
        for layer, again in zip(model.model.layers, opened.model.layers, strict=True):  # not every kernel asks for it
            assert layer.self_attn.num_key_value_groups == again.self_attn.num_key_value_groups
    for reference, answer in zip(references, open_folders(references), strict=True):
        assert judge(reference, answer).logits_difference <= 1e-5

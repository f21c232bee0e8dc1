"""The sweep over all causal language models on a few types with unusual parts; ``make sweep`` does them all."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.testing.architectures import summary, table, wrong
from secateur.testing.sweep import read, sweep
from secateur.testing.zoo import MODEL_TYPES, UNBUILDABLE, Shape

Facts = dict[str, Any]

# type: places where feed-forward widths and heads are cut, and what is said about the rest
EXPECTED: dict[str, tuple[int, int, str]] = {
    "bloom": (2, 0, "its units have fixed values (arange)"),  # ALiBi
    "codegen": (2, 0, "slicing differs from masking"),  # rows in four parts, the number written down
    "dbrx": (2, 2, "arithmetic on an index"),  # experts in one matrix, whose width a module around them knows
    "diffllama": (2, 0, "on padded text"),  # two attention maps subtracted: an odd number of heads fails under a mask
    "gemma3n_text": (7, 0, "a mean runs over its units outside of a norm"),  # sparse activations, shared KV caches
    "jetmoe": (2, 2, "its values steer the code (.tolist())"),  # experts of attention heads
    "longcat_flash": (6, 4, ""),  # two attentions and three feed-forwards a layer, experts that do nothing
    "phimoe": (2, 2, ""),  # experts are chosen one after the other, each as the best of those that are left
    "trocr": (2, 0, "RuntimeError"),  # the hidden size stands for that of the heads
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    folder = tmp_path_factory.mktemp("sweep")
    sweep(list(EXPECTED)[:4], folder)
    sweep(list(EXPECTED), folder, batch=len(EXPECTED))  # goes on where the first stopped
    found = read(folder / "results.jsonl")
    assert [facts["type"] for facts in found] == list(EXPECTED)
    return {facts["type"]: facts for facts in found}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_what_is_offered_is_exact_and_the_rest_says_why(results: dict[str, Facts], model_type: str) -> None:
    facts = results[model_type]
    ffn, attention, reason = EXPECTED[model_type]
    assert wrong([facts]) == []
    assert (facts["kinds"]["ffn"][0], facts["kinds"]["attention"][0]) == (ffn, attention)
    reasons = [why for kind in ("ffn", "attention", "expert") for why in facts["protected"].get(kind, [])]
    assert any(reason in why for why in reasons) if reason else reasons == []
    assert facts["difference"] <= 1e-4
    assert facts["on_request"].get("query", "exact") == "exact"
    assert facts["generate"] == "same"
    assert facts["lora"] == "same"


def test_saved_models_open_in_a_fresh_process_and_compute_the_same(results: dict[str, Facts]) -> None:
    for facts in results.values():
        for name in ("same", "differing", *(["query"] if "save_query" in facts else [])):
            if not facts[f"save_{name}"].startswith("refused"):
                assert facts[f"reload_{name}"] <= 1e-4, facts["type"]
    ways = {facts[f"save_{name}"].partition(":")[0] for facts in results.values() for name in ("same", "differing")}
    assert ways >= {"plain", "uneven"}
    assert {kind for kind, facts in results.items() if "save_query" in facts} >= {"dbrx", "gemma3n_text"}


def test_experts_that_are_chosen_one_by_one_are_experts(results: dict[str, Facts]) -> None:
    assert results["phimoe"]["on_request"]["expert"] == "exact"


def test_the_page_has_a_row_for_each_type(results: dict[str, Facts]) -> None:
    page = table(list(results.values()))
    assert all(f"| `{model_type}` | " in page for model_type in EXPECTED)
    assert "Wrong results: 0." in summary(list(results.values()))
    broken = results["dbrx"] | {"failures": {"layers.0.mlp": "slicing differs from masking by 1.0e+00"}}
    assert "Wrong results: 1. (dbrx: slicing differs" in summary([broken])


def test_every_type_is_built_or_has_a_reason() -> None:
    assert set(MODEL_TYPES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(UNBUILDABLE) <= set(MODEL_TYPES)
    assert all(UNBUILDABLE.values())


def test_shapes_are_unusual() -> None:
    shapes = [Shape.draw(seed) for seed in range(12)]
    assert any(shape.kv_heads == 1 for shape in shapes)
    assert any(shape.heads % 2 for shape in shapes)
    assert any(shape.ffn % 2 for shape in shapes)
    assert all(shape.heads * shape.head_dim != shape.hidden for shape in shapes)

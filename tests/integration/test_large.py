"""Models of real size without weights: what may be cut, whether narrow stand-ins say so, and what a plan leaves.

Nothing here needs memory. The one that most users have is in the default suite, ``make slow`` runs the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur import stages
from secateur.config import load_recipe
from secateur.export import huggingface
from secateur.loading import quiet_transformers
from secateur.surgery import checked_trace, verify_cuts

_LLAMA_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_GEMMA_27B: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
}
_TOWER = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
_QWEN_30B: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
LARGE: Mapping[str, tuple[str, Mapping[str, Any], float, dict[str, int]]] = {
    # name: (model type, config, billions of parameters, groups that may be cut)
    "llama-3-8b": ("llama", _LLAMA_8B, 8.03, {"attention": 32, "ffn": 32}),
    "mixtral-8x7b": (
        "mixtral",
        {**_LLAMA_8B, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
        46.7,
        {"attention": 32, "ffn": 32},
    ),
    "qwen3-30b": ("qwen3_moe", _QWEN_30B, 30.5, {"attention": 48, "ffn": 48}),
    "gemma-3-27b": (
        "gemma3",
        {
            "text_config": _GEMMA_27B,
            "vision_config": {**_TOWER, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False},
        },
        27.4,
        {"attention": 62, "ffn": 62},
    ),
    "deepseek-v3": ("deepseek_v3", {"num_hidden_layers": 61}, 671.0, {"attention": 61, "ffn": 119}),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9, {"attention": 24, "ffn": 24}),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LARGE if name != "llama-3-8b"]


def without_weights(name: str) -> PreTrainedModel:
    family, options, _, _ = LARGE[name]
    config = AutoConfig.for_model(family, **options)
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.parametrize("name", ["llama-3-8b", *SLOW])
def test_a_large_model_is_planned_without_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, billions, expected = LARGE[name]
    model = without_weights(name)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    graph = checked_trace(model)
    assert Counter(group.kind for group in graph.prunable) == expected
    assert not [group.name for group in graph if (group.protected or "").startswith("cutting it failed")]
    recipe = load_recipe(
        None, ["evaluation.speed=false", "recovery.steps=0", "recovery.repair=false"], {"method": "magnitude"}
    )
    plan = stages.rehearse(model, graph, recipe)
    assert plan.ratio_reached == pytest.approx(0.2, abs=0.002)
    monkeypatch.setattr(huggingface, "check_room", lambda folder, needed: None)
    stages.rehearse_output(stages.Result(model, None, plan, graph, recipe), tmp_path / "out")


@pytest.mark.parametrize("name", SLOW)
def test_all_cuts_of_a_large_model_are_exact_in_its_stand_in(name: str) -> None:
    found = verify_cuts(without_weights(name))
    assert len(found) >= 6
    assert all(check.ok and "on random weights" in check.message for check in found)

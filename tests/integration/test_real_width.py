"""Real widths through everything: pruned, saved, inspected, pruned again, exported, measured. ``make slow`` runs it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import write_letters
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.evaluation import parameter_count
from secateur.surgery import verify_cuts
from secateur.testing.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

_SIZES: Mapping[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen3": ("qwen3", {**_SIZES, "head_dim": 64, "tie_word_embeddings": True}),  # heads are not the hidden width
    "gemma2": ("gemma2", {**_SIZES, "head_dim": 192, "query_pre_attn_scalar": 192, "sliding_window": 32}),
}
FEW_STEPS = """
calibration: {text: letters.txt, window: 32, tokens: 256}
method: {name: lorashear, periods: 2, period_steps: 2}
recovery: {text: letters.txt, window: 32, tokens: 512, steps: 2}
evaluation: {text: letters.txt, window: 32, tokens: 512, speed: false}
training: {precision: fp32}
"""


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_letters(tmp_path)
    (tmp_path / "few.yaml").write_text(FEW_STEPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "magnitude"), ("llama", "lorashear"), ("qwen3", "magnitude"), ("gemma2", "lorashear")],
)
def test_a_model_of_real_width(place: Path, family: str, method: str) -> None:
    model_type, sizes = FAMILIES[family]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    with torch.no_grad():  # later layers matter more, so that widths come out different
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(1 + index)
    assert parameter_count(model) > 3 * 20_000_000
    model.save_pretrained("whole")
    tiny_tokenizer().save_pretrained("whole")

    options = ("--recipe", "few.yaml", "--method", method, "--set", "model.dtype=float32", "--device", "cpu")
    call("prune", "whole", "-o", "once", "--ratio", "0.25", *options)
    once, _ = secateur.load("once", dtype="float32")
    assert parameter_count(once) == pytest.approx(0.75 * parameter_count(model), rel=0.01)
    if method == "magnitude":
        assert len({layer.mlp.down_proj.in_features for layer in once.model.layers}) > 1
    call("inspect", "once", "--verify", "--set", "model.dtype=float32", "--device", "cpu")
    call("verify", "once")

    call("prune", "once", "-o", "twice", "--ratio", "0.25", *options)
    twice, _ = secateur.load("twice", dtype="float32")
    assert parameter_count(twice) == pytest.approx(0.75**2 * parameter_count(model), rel=0.02)
    assert all(check.ok for check in verify_cuts(twice))
    call("verify", "twice")
    call("evaluate", "twice", "--text", "letters.txt", "--window", "32", "--tokens", "512", "--device", "cpu")
    call("export", "twice", "--to", "uniform", "-o", "even", "--device", "cpu")
    AutoModelForCausalLM.from_pretrained("even")
    if family != "gemma2":  # llama.cpp reads its layers by other names
        source = "twice" if family == "llama" else "even"  # llama.cpp has no loader for others of different sizes
        shutil.copytree(source, "plain", ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat*"))
        call("export", "plain", "--to", "gguf", "-o", "twice.gguf", "--device", "cpu")
        assert Path("twice.gguf").stat().st_size > parameter_count(twice)

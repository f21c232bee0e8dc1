"""Saved models in other forms: filled up to equal layers, as GGUF files, as ONNX graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from secateur import pipeline
from secateur.cli import Form, app
from secateur.config import load_recipe
from secateur.errors import InputError, ModelError
from secateur.export import FORMS, adopt_config
from secateur.export.uniform import uniform_model
from secateur.graph import trace
from secateur.loading import load
from secateur.surgery import apply_updates, slice_model
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

IDS = torch.arange(20).reshape(1, 20)


def uneven(name: str) -> PreTrainedModel:
    """A tiny model that has lost other numbers of units, not the last ones, in each of its layers."""
    model = build(name)
    graph = trace(model)
    kept = {}
    for number, group in enumerate(group for group in graph.prunable if group.within is None):
        lost = 1 + number % 3 if group.kind == "ffn" else number // 2 % 2
        kept[group.name] = list(range(min(lost, group.size - 1), group.size))
    slice_model(model, graph, kept)
    adopt_config(model, graph, kept)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def convert(folder: Path, form: Any, output: Path) -> str:
    recipe = load_recipe(flags={"model.name": str(folder), "model.device": "cpu"})
    return pipeline.convert(recipe, form, output)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-odd", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "falcon-new"])
def test_layers_filled_up_with_zeros_compute_the_same(name: str) -> None:
    model = uneven(name)
    assert type(model).__name__.startswith("Pruned")
    even = uniform_model(model)
    assert type(even) is type(build(name))
    assert not hasattr(even.config, "pruned_layers")
    torch.testing.assert_close(logits(even), logits(model), atol=1e-5, rtol=1e-5)


def test_biases_that_a_method_has_brought_are_kept(tmp_path: Path) -> None:
    model = build("llama-gqa")
    graph = trace(model)
    kept = {"layers.0.mlp": list(range(3, 40))}
    slice_model(model, graph, kept)
    torch.manual_seed(0)
    width = model.config.hidden_size
    apply_updates(model, {f"model.layers.{layer}.mlp.down_proj.bias": torch.randn(width) for layer in (0, 1)})
    adopt_config(model, graph, kept)
    even = uniform_model(model)
    assert even.config.mlp_bias
    torch.testing.assert_close(logits(even), logits(model), atol=1e-5, rtol=1e-5)


def test_what_zeros_would_change_is_refused() -> None:
    with pytest.raises(ModelError, match="mean counts its units"):
        uniform_model(uneven("olmo2"))
    with pytest.raises(ModelError, match="same sizes already"):
        uniform_model(build("llama-gqa"))


def test_a_filled_up_folder_opens_plainly(tmp_path: Path) -> None:
    model = uneven("llama-gqa")
    model.save_pretrained(tmp_path / "uneven")
    said = convert(tmp_path / "uneven", "uniform", tmp_path / "even")
    assert "opens it without secateur" in said
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="not empty"):
        convert(tmp_path / "uneven", "uniform", tmp_path / "even")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pair encoding with the splitting of SmolLM: digits alone, then GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet, "th", "the", "Ġthe"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def with_text(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a vocabulary that holds all bytes."""
    model.resize_token_embeddings(264, mean_resizing=False)
    return model


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "mistral", "qwen2", "qwen3", "uneven llama-gqa"])
def test_a_gguf_file_holds_every_weight_under_the_name_that_llama_cpp_reads(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = uneven(name.split()[1]) if " " in name else build(name)
    with_text(model).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    said = convert(tmp_path / "model", "gguf", tmp_path / "model.gguf")
    assert ("llama.cpp opens it" in said) is (importlib.util.find_spec("llama_cpp") is not None)
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    weights = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    assert sum(weight.numel() for weight in weights.values()) == sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    assert torch.equal(weights["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(weights["token_embd.weight"], state["model.embed_tokens.weight"])
    query, stored = state["model.layers.1.self_attn.q_proj.weight"], weights["blk.1.attn_q.weight"]
    if name in ("qwen2", "qwen3"):
        assert torch.equal(stored, query)
    else:  # rows 0, 1 of a head are those of its two halves
        half = model.config.head_dim // 2
        assert torch.equal(stored[:4], query[[0, half, 1, half + 1]])
    tokens = file.get_field("tokenizer.ggml.tokens")
    assert len(tokens.contents()) == 264
    # transformers opens the tokenizer of a qwen model with Qwen's splitting, whatever its file says
    assert file.get_field("tokenizer.ggml.pre").contents() == ("qwen2" if name == "qwen2" else "smollm")
    assert file.get_field("general.architecture").contents() == (
        "deci" if " " in name else name if name.startswith("qwen") else "llama"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gguf_file_is_of_the_type_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = build("llama-gqa")
    model.save_pretrained(tmp_path / "model")
    recipe = load_recipe(flags={"model.name": str(tmp_path / "model"), "model.device": "cpu", "export.dtype": dtype})
    pipeline.convert(recipe, "gguf", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    stored = torch.tensor(down.data).view(getattr(torch, dtype))
    assert torch.equal(stored, model.model.layers[0].mlp.down_proj.weight.to(stored.dtype))


def test_positions_of_llama_3_are_divided_as_transformers_divides_them() -> None:
    pytest.importorskip("gguf")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from secateur.export.gguf import _llama3_factors

    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / _llama3_factors(rope, 16), theirs)


def test_what_llama_cpp_would_read_wrongly_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    uneven("qwen3").save_pretrained(tmp_path / "uneven")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    build("llama-gqa").save_pretrained(tmp_path / "letters")
    tiny_tokenizer().save_pretrained(tmp_path / "letters")
    for folder, message in (("uneven", "--to uniform"), ("gpt2", "this is a gpt2 model"), ("letters", "WordLevel")):
        with pytest.raises(ModelError, match=message):
            convert(tmp_path / folder, "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "letters", "gguf", tmp_path / "model.gguf")


def test_an_onnx_graph_computes_the_same_with_layers_that_differ(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    uneven("llama-gqa").save_pretrained(tmp_path / "uneven")
    tiny_tokenizer().save_pretrained(tmp_path / "uneven")
    assert "ONNX Runtime opens it" in convert(tmp_path / "uneven", "onnx", tmp_path / "graph")
    assert {"model.onnx", "tokenizer.json"} <= {path.name for path in (tmp_path / "graph").iterdir()}


def test_the_command_line_says_what_was_checked(tmp_path: Path) -> None:
    assert {form.value for form in Form} == set(FORMS)
    uneven("llama-gqa").save_pretrained(tmp_path / "uneven")
    arguments = ["export", str(tmp_path / "uneven"), "--to", "uniform", "-o", str(tmp_path / "even")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "opens it without secateur" in result.stderr
    assert load(str(tmp_path / "even"), device="cpu")[0].num_parameters() > uneven("llama-gqa").num_parameters()
    assert CliRunner().invoke(app, [*arguments[:3], "pickle", *arguments[4:]]).exit_code == 2

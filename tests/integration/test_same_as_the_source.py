"""A result is the user's model, smaller, and otherwise the same: its files are compared key by key.

Every family goes through a step of training, since that is where libraries leave traces.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from secateur import pipeline
from secateur.config import load_recipe
from secateur.export import ExportSettings, written_bytes
from secateur.export.huggingface import write
from secateur.graph import trace
from secateur.loading import load
from secateur.surgery import slice_model
from secateur.testing.tiny import TINY, build
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.training import LoraSettings, TrainingSettings, attach_lora, merge_lora, train

CUT = {
    "intermediate_size",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
}
CUT |= {"num_key_value_heads", "num_attention_heads", "num_kv_heads", "n_head", "head_dim"}
CUT |= {"experts_implementation", "num_nextn_predict_layers"}  # kernels for their width; layers that the files lack
LAYERS = {"per_layer_config", "pruned_layers", "auto_map", "architectures"}
WORDS = {
    "chat_template.jinja": "{{ messages }} ",
    "special_tokens_map.json": '{"bos_token":   "<s>"}',
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "preprocessor_config.json": '{"image_processor_type": "X"}',
    "processor_config.json": '{"processor_class": "Y"}',
    "LICENSE": "do as you like",
    "Notice.txt": "made by us",
    "USE_POLICY.md": "be good",
}
LEFT = {"README.md": "# The source", "code.py": "1/0", "optimizer.pt": "x", "pytorch_model.bin": "x", "notes.txt": "x"}


def source_in(folder: Path, family: str, tokenizer: bool = True) -> Path:
    """A folder as authors write them: keys that nobody knows, defaults spelled out, no padding token, leftovers."""
    model = build(family).to(torch.bfloat16)
    model.save_pretrained(folder)
    if tokenizer:
        words = tiny_tokenizer()
        words.pad_token = None
        words.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config |= {
        "use_cache": True,
        "made_by": {"whom": "someone"},
        "initializer_range": 0.02,
        "_name_or_path": "old/name",
    }
    config |= {"transformers_version": "4.40.0", "auto_map": {"AutoModelForCausalLM": "code.Theirs"}}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "own": 1, "transformers_version": "4.40.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "additional_chat_templates").mkdir()
    for name, content in (WORDS | LEFT).items():
        (folder / name).write_text(content)
    return folder


def same_but_for(source: Path, out: Path, allowed: set[str]) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...)}
    unexpected = {key for key in changed - allowed - {"transformers_version"} if not key.startswith("pruned_")}
    assert not unexpected, {key: (before.get(key, ...), after.get(key, ...)) for key in unexpected}
    kept = [*WORDS, "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists()]


@pytest.mark.parametrize("family", list(TINY))
def test_nothing_differs_but_what_the_cut_changes(family: str, tmp_path: Path) -> None:
    source = source_in(tmp_path / "source", family)
    model, tokenizer = load(str(source), device="cpu")
    model.stored_dtype = torch.bfloat16
    adapted = attach_lora(model, LoraSettings(rank=2), 0)
    ids = torch.randint(4, 40, (4, 12))
    train(adapted, ids, TrainingSettings(precision="fp32"), steps=1, seed=0, description="one step")
    model = merge_lora(adapted)
    assert tokenizer is not None
    tokenizer("some text", padding=True, truncation=True, max_length=8)
    graph = trace(model)
    kept = {group.name: list(range((group.size + 1) // 2)) for group in graph.prunable}
    slice_model(model, graph, kept)
    out = tmp_path / "out"
    out.mkdir()
    write(model, tokenizer, out, graph=graph, kept=kept)
    same_but_for(source, out, CUT | LAYERS)
    config = json.loads((out / "config.json").read_text())
    assert config.get("auto_map", {}) in ({}, {"AutoModelForCausalLM": f"modeling_pruned.{config['architectures'][0]}"})
    assert ("auto_map" in config) == (out / "modeling_pruned.py").exists()
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert stored < sum(path.stat().st_size for path in source.glob("*.safetensors"))


@pytest.mark.parametrize("method", ["lorashear", "loraprune", "magnitude"])
def test_methods_that_train_leave_no_trace(method: str, tmp_path: Path) -> None:
    source = source_in(tmp_path / "source", "llama-gqa")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the letter {i} came late and nobody asked who wrote it " * 8 for i in range(60)))
    keys = [
        f"{part}.{key}" for part in ("calibration", "recovery", "evaluation") for key in (f"text={text}", "window=16")
    ]
    keys += ["calibration.tokens=128", "recovery.tokens=512", "evaluation.tokens=128", "recovery.steps=2"]
    keys += ["evaluation.speed=false", "evaluation.baseline=null", "training.precision=fp32", "budget.ranking=layer"]
    keys += ["method.period_steps=2", "method.periods=1"] if method == "lorashear" else []
    keys += ["method.steps=2"] if method == "loraprune" else []
    recipe = load_recipe(None, keys, {"method": method})
    model, tokenizer = load(str(source), device="cpu")
    result = pipeline.prune(model, tokenizer, recipe=recipe)
    assert model.config.use_cache is True
    out = tmp_path / "out"
    out.mkdir()
    write(result.model, result.tokenizer, out, graph=result.graph, kept=result.plan.kept)
    same_but_for(source, out, CUT | {"auto_map"})


def test_a_tokenizer_that_was_changed_is_saved_as_it_is_now(tmp_path: Path) -> None:
    source = source_in(tmp_path / "source", "llama-gqa")
    model, tokenizer = load(str(source), device="cpu")
    assert tokenizer is not None
    tokenizer.chat_template = "{{ new }}"
    model.generation_config.top_p = 0.5
    model.generation_config.do_sample = True
    (tmp_path / "out").mkdir()
    write(model, tokenizer, tmp_path / "out", graph=trace(model), kept={})
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ new }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    changed = {"top_p": 0.5, "do_sample": True}
    assert {"temperature": 0.6, "own": 1, "eos_token_id": [2, 3], **changed}.items() <= generation.items()


def test_without_its_folder_a_model_is_written_as_transformers_does(tmp_path: Path) -> None:
    source = source_in(tmp_path / "source", "llama-gqa")
    model, tokenizer = load(str(source), device="cpu")
    shutil.rmtree(source)
    model.generation_config.do_sample = True  # temperature without it is refused
    (tmp_path / "out").mkdir()
    write(model, tokenizer, tmp_path / "out", graph=trace(model), kept={})
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.made_by == {"whom": "someone"}
    assert not hasattr(config, "auto_map")


def test_each_tensor_keeps_the_type_of_the_file(tmp_path: Path) -> None:
    """Also what the family would keep in float32, and one that its author stored in more bits than the rest."""
    model = build("llama-gqa").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "source")
    opened, _ = load(str(tmp_path / "source"), device="cpu")
    opened.stored_dtype = torch.bfloat16
    (tmp_path / "out").mkdir()
    write(opened, None, tmp_path / "out", graph=trace(opened), kept={})
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        types: dict[str, Any] = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert types.pop("model.norm.weight") == "F32"
    assert set(types.values()) == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    count = sum(weight.numel() for weight in opened.parameters())
    assert written_bytes(opened, ExportSettings()) == 2 * count + 2 * opened.model.norm.weight.numel()

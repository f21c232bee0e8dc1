"""What the weight files hold against what config.json says: the same tensors, or one message before they are read."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur import export
from secateur.errors import ModelError, out_of_memory
from secateur.graph import trace
from secateur.loading import load, opening, outline
from secateur.testing.tiny import SPECS, build

OPENERS: list[Callable[..., Any]] = [load, outline]
IDS = torch.arange(4, 16)[None]


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def write(folder: Path, name: str, **changes: object) -> PreTrainedModel:
    """A tiny model in ``folder``, whose config.json then says something else."""
    model = build(name)
    model.save_pretrained(folder)
    edit(folder / "config.json", **changes)
    return model


# Tensors without a place


@pytest.mark.parametrize(
    ("kind", "changes", "tensor"),
    [
        ("llama-gqa", {"num_hidden_layers": 1}, r"model\.layers\.1\.input_layernorm\.weight"),
        ("llama-bias", {"attention_bias": False}, r"layers\.0\.self_attn\.\w_proj\.bias"),
        ("llama-bias", {"mlp_bias": False}, r"mlp\.\w+_proj\.bias"),
        # where experts are put together while they are read
        ("olmoe", {"num_hidden_layers": 1}, r"model\.layers\.1\."),
        # what transformers leaves out without a word
        ("deepseek-v3", {}, r"model\.layers\.61\.eh_proj\.weight"),
    ],
)
def test_tensors_without_a_place_are_refused_by_name_or_dropped_aloud(
    kind: str, changes: dict[str, Any], tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, kind, **changes)
    if kind == "deepseek-v3":
        add(tmp_path, **{"model.layers.61.eh_proj.weight": torch.ones(48, 96)})
    for opener in OPENERS:
        with pytest.raises(ModelError, match=rf"no place in the architecture.*{tensor}.*model\.drop_unexpected=true"):
            opener(str(tmp_path))
    heard: list[str] = []
    monkeypatch.setattr(opening, "say", heard.append)
    model, _ = load(str(tmp_path), device="cpu", drop_unexpected=True)
    assert any("Leaving out" in line for line in heard)
    assert model(IDS).logits.isfinite().all()
    assert not getattr(model.config, "num_nextn_predict_layers", 0)


def test_no_config_promises_layers_that_predict_more_tokens(tmp_path: Path) -> None:
    assert write(tmp_path, "deepseek-v3").config.num_nextn_predict_layers == 1
    for model in (load(str(tmp_path))[0], outline(str(tmp_path))):
        assert model.config.num_nextn_predict_layers == 0
    model.config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not any(written.get(key) for key in ("num_nextn_predict_layers", "num_mtp_layers"))


def test_what_a_model_from_python_becomes_promises_none_either(tmp_path: Path) -> None:
    model = build("deepseek-v3")
    assert model.config.num_mtp_layers == 1
    model.config.mtp_config = {"num_nextn_predict_layers": 2, "depth": 3}
    graph = trace(model)
    export.save_folder(model, None, tmp_path / "whole", graph=graph, kept={})
    assert model.config.num_mtp_layers == 1  # it is not changed
    secateur.prune(
        model,
        method="magnitude",
        recipe={"budget": {"kinds": ["ffn"]}, "recovery": {"steps": 0}},
        output=tmp_path / "cut",
    )
    for name in ("whole", "cut"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert not any(written.get(key) for key in ("num_nextn_predict_layers", "num_mtp_layers"))
        assert written["mtp_config"] == {"num_nextn_predict_layers": 0, "depth": 3}


def test_buffers_that_the_model_computes_itself_are_no_loss(tmp_path: Path) -> None:
    write(tmp_path / "llama", "llama-gqa")
    add(
        tmp_path / "llama",
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "model.rotary_emb.inv_freq": torch.ones(6)},
    )
    write(tmp_path / "gpt2", "gpt2")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    add(tmp_path / "gpt2", **{"transformer.h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)})
    for folder in ("llama", "gpt2"):
        load(str(tmp_path / folder))
    add(tmp_path / "gpt2", **{"transformer.h.7.attn.bias": torch.ones(48)})  # no mask
    with pytest.raises(ModelError, match=r"1 tensors that have no place.*h\.7\.attn\.bias"):
        load(str(tmp_path / "gpt2"))


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("llama-mha", "llama-mqa", "llama-square")])
def test_every_family_has_a_place_for_what_it_saves(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    model = outline(str(tmp_path))
    assert model.stored_dtype == torch.float32
    assert model.source_folder == tmp_path


def test_missing_parameters_cannot_be_hidden_by_the_family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head", r"norm"])
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for opener in OPENERS:
        with pytest.raises(ModelError, match=r"no fitting weights for 1 parameters.*model\.norm\.weight"):
            opener(str(folder))


@pytest.mark.parametrize("damage", ["narrower", "missing"])
def test_experts_whose_parts_do_not_make_a_whole(damage: str, tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if "experts.0" in key)
    if damage == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for opener in OPENERS:
        with pytest.raises(ModelError, match=r"no fitting weights for .*experts"):
            opener(str(tmp_path))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (r"experts\.1\.", r"experts\.down_proj: \[\d, 48, \d+\] instead of"),
        (r"experts\.2\.(w3|up_proj)", r"experts\.gate_up_proj"),
        (r"experts\.\d+\.(w2|down_proj)", r"experts\.down_proj"),
        (r"gate\.weight", r"gate\.weight"),
        (r"o_proj", r"o_proj\.weight"),
        (r"gate\.e_score_correction_bias", r"e_score_correction_bias"),
    ],
)
def test_what_is_missing_among_experts_that_are_put_together(
    lost: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(write(tmp_path, "deepseek-v3"))
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_missing", [r"o_proj", r"gate\.weight"])  # the family hides it
    weights = load_file(tmp_path / "model.safetensors")
    left = {key: tensor for key, tensor in weights.items() if not re.search(rf"layers\.1\..*{lost}", key)}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for opener in OPENERS:
        with pytest.raises(ModelError, match=rf"no fitting weights for .* the first is model\.layers\.1\..*{words}"):
            opener(str(tmp_path))


def test_two_tensors_for_one_place(folder: Path) -> None:
    add(folder, **{"norm.weight": torch.ones(48)})
    with pytest.raises(ModelError, match=r"two tensors for model\.norm\.weight"):
        load(str(folder))


def test_a_billion_layers_are_not_built(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=10**9)
    for opener in OPENERS:
        with pytest.raises(ModelError, match=r"speaks of 1,000,000,000 layers"):
            opener(str(folder))


# Tied in the config, two in the files


def test_a_head_of_its_own_is_used_and_saved_whatever_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write(tmp_path / "model", "llama-gqa", tie_word_embeddings=True)
    heard: list[str] = []
    monkeypatch.setattr(opening, "say", heard.append)
    model, _ = load(str(tmp_path / "model"), device="cpu")
    assert any("lm_head.weight" in line and "tie_word_embeddings" in line for line in heard)
    assert not outline(str(tmp_path / "model")).config.tie_word_embeddings
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for opened in (model, again):
        assert torch.equal(opened(IDS).logits, dense(IDS).logits)


def test_a_head_that_is_the_embedding_stays_tied(folder: Path) -> None:
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add(folder, **{"lm_head.weight": embedding.clone()})
    model, _ = load(str(folder), device="cpu")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit(folder / "config.json", tie_word_embeddings=False)
    assert load(str(folder), device="cpu")[0].lm_head.weight is not None
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no fitting weights.*lm_head\.weight"):
        load(str(folder))


# Types


@pytest.mark.parametrize("said", [..., "float32", "float16"])
def test_the_type_is_that_of_the_files(said: object, folder: Path) -> None:
    build("llama-tied").to(torch.bfloat16).save_pretrained(folder)
    edit(folder / "config.json", dtype=said, torch_dtype=...)
    model, _ = load(str(folder), device="cpu")
    assert (model.stored_dtype, model.dtype) == (torch.bfloat16, torch.float32)


def retype(folder: Path, key: str, kind: str) -> None:
    """Let the header of the file call one tensor by another type of as many bytes."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    if kind.startswith("F8") or kind in ("BOOL", "U8"):
        head[key]["shape"][-1] *= 4
    head[key]["dtype"] = kind
    new = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


@pytest.mark.parametrize("kind", ["I32", "U32", "BOOL", "U8", "F8_E4M3", "I13"])
@pytest.mark.parametrize("family", ["llama-tied", "olmoe"])
def test_weights_of_another_type_are_refused_by_name(kind: str, family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    key = {"llama-tied": "model.layers.0.mlp.down_proj.weight", "olmoe": "model.layers.0.mlp.experts.1.up_proj.weight"}
    retype(tmp_path, key[family], kind)
    for opener in OPENERS:
        with pytest.raises(ModelError, match=rf"{key[family]}.*{kind}"):
            opener(str(tmp_path))


# Several files


def shard(folder: Path, model: PreTrainedModel) -> list[Path]:
    """``model`` in several files beside what ``folder`` holds."""
    kept = (folder / "model.safetensors").read_bytes() if (folder / "model.safetensors").exists() else None
    model.save_pretrained(folder, max_shard_size="10KB")
    if kept is not None:
        (folder / "model.safetensors").write_bytes(kept)
    return sorted(folder.glob("model-*.safetensors"))


def test_an_index_beside_the_whole_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = shard(folder, build("llama-tied"))
    logits = load(str(folder), device="cpu")[0](IDS).logits  # the same weights twice
    shard(folder, build("llama-tied", seed=1))
    for opener in OPENERS:
        with pytest.raises(ModelError, match=r"two sets of weights.* model\.safetensors, and .*safetensors\.index"):
            opener(str(folder))
    shards[0].unlink()
    heard: list[str] = []
    monkeypatch.setattr("secateur.loading.weights.say", heard.append)
    assert torch.equal(load(str(folder), device="cpu")[0](IDS).logits, logits)
    assert shards[0].name in heard[0]


def test_a_tensor_in_two_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = shard(folder, build("llama-tied"))
    twice = load_file(shards[0])
    save_file(load_file(shards[1]) | twice, shards[1], metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"both hold the tensor {min(twice)}"):
        load(str(folder))


@pytest.mark.parametrize("name", ["../model/model.safetensors", "weights.bin", "/etc/passwd"])
def test_an_index_names_files_of_its_folder_only(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"which is no safetensors file of this folder"):
        load(str(folder))


def test_an_index_names_files_that_can_be(folder: Path) -> None:
    for beside in (True, False):
        for name in (f"{'x' * 300}.safetensors", "a\0b.safetensors"):
            index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            for opener in OPENERS:
                with pytest.raises(ModelError, match=r"index\.json names a file that cannot be"):
                    opener(str(folder))
        if beside:
            (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("said", [{}, {"metadata": None}, {"metadata": "x"}])
def test_an_index_without_metadata_is_refused_by_name(said: dict[str, object], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shard(folder, build("llama-tied"))
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": json.loads(file.read_text())["weight_map"]} | said))
    for opener in OPENERS:
        with pytest.raises(ModelError, match=r"index\.json: metadata is .*must be an object"):
            opener(str(folder))


# Memory


def test_too_little_memory_is_said_as_that(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Callable[..., Any]:
        def opens(*arguments: object, **options: object) -> None:
            raise error

        return opens

    words = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    for error in (RuntimeError(words), OSError(12, "Cannot allocate memory"), MemoryError()):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails(error))
        with pytest.raises(ModelError, match=r"^There is too little memory to open"):
            load(str(folder))
        monkeypatch.setattr("secateur.loading.weights.safe_open", fails(error))
        with pytest.raises(ModelError, match=r"^There is too little memory to open"):
            outline(str(folder))
        monkeypatch.undo()


def test_what_lack_of_memory_looks_like() -> None:
    def caused(error: Exception, by: Exception) -> Exception:
        error.__cause__ = by
        return error

    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(caused(ValueError("no"), RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")))
    assert not out_of_memory(caused(ValueError("no"), OSError(28, "No space left on device")))
    loop = ValueError("goes round")
    loop.__context__ = caused(KeyError("in a circle"), loop)
    assert not out_of_memory(loop)

"""A saved folder opens in a fresh process without secateur and computes what the model in memory computed.

All tiny families, cut evenly and unevenly, are written first and opened together in one process.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from secateur.errors import InputError, ModelError, VerificationError
from secateur.export import ExportSettings, Verification, huggingface, save_folder
from secateur.export.huggingface import write
from secateur.export.verify import Reference, judge, open_folders
from secateur.graph import trace
from secateur.loading import load
from secateur.surgery import slice_model
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.types import DependencyGraph

Kept = dict[str, list[int]]
IDS = torch.arange(3, 25)[None]

# Families whose own code computes some size from others, so that even cut heads need sizes of layers in the config.
TIED_SIZES = {
    "gpt-neox", "gpt2", "opt", "bloom", "falcon-mqa", "falcon-new", "stablelm", "gpt-bigcode", "gptj", "olmoe",
}  # fmt: skip

# Llama's own config demands that the heads divide the hidden size.
INDIVISIBLE = {"llama-odd"}
# One layer, or one dense and one of experts: nothing that could differ between layers (attention happens not to).
ONE_OF_A_KIND = {"llama-one-layer", "qwen3-moe"}


def halved(graph: DependencyGraph) -> Kept:
    """Half of every group, the same number in each layer."""
    shuffled = random.Random(1)
    return {g.name: sorted(shuffled.sample(range(g.size), (g.size + 1) // 2)) for g in graph.prunable}


def uneven(graph: DependencyGraph) -> Kept:
    """A random number of units of every group, from one to all; never the same width in two feed-forward layers."""
    shuffled = random.Random(2)
    kept = {}
    for number, group in enumerate(graph.prunable):
        left = shuffled.randint(1, group.size)
        if group.kind == "ffn":
            left = group.size - 3 - number
        kept[group.name] = sorted(shuffled.sample(range(group.size), left))
    return kept


def cut(name: str, how: Any) -> tuple[PreTrainedModel, DependencyGraph, Kept]:
    model = TINY[name]()
    graph = trace(model)
    kept = how(graph)
    slice_model(model, graph, kept)
    return model, graph, kept


@dataclass(frozen=True)
class Opened:
    reference: Reference
    answer: dict[str, Any]
    parameters: int

    def judged(self) -> Verification:
        return judge(self.reference, self.answer)


def _import_secateur(folder: Path) -> None:
    file = folder / "modeling_pruned.py"
    file.write_text(f"{file.read_text()}\n\nimport secateur\n")


def _flip_channels(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].flip(1).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """Every family, cut both ways, as a fresh process finds it."""
    root = tmp_path_factory.mktemp("folders")
    references, parameters = {}, {}
    for name in TINY:
        for how in (halved, uneven):
            key = f"{name}-{how.__name__}"
            model, graph, kept = cut(name, how)
            (root / key).mkdir()
            references[key] = write(model, None, root / key, graph=graph, kept=kept)
            parameters[key] = sum(parameter.numel() for parameter in model.parameters())
    for key, damage in (("needs-secateur", _import_secateur), ("damaged", _flip_channels)):
        shutil.copytree(root / "llama-gqa-uneven", root / key)
        damage(root / key)
        references[key] = references["llama-gqa-uneven"]._replace(folder=root / key, trusted=True)
        parameters[key] = parameters["llama-gqa-uneven"]
    answers = open_folders(list(references.values()))
    return {
        key: Opened(references[key], answer, parameters[key]) for key, answer in zip(references, answers, strict=True)
    }


@pytest.mark.parametrize("how", ["halved", "uneven"])
@pytest.mark.parametrize("name", list(TINY))
def test_every_family_opens_and_computes_the_same(name: str, how: str, opened: dict[str, Opened]) -> None:
    found = opened[f"{name}-{how}"]
    verification = found.judged()
    assert verification.logits_difference <= 1e-5
    assert verification.dynamic_cache_difference is not None
    assert verification.static_cache_difference is not None
    assert verification.parameters == found.parameters
    plain = name not in TIED_SIZES and (name in ONE_OF_A_KIND if how == "uneven" else name not in INDIVISIBLE)
    assert verification.trust_remote_code is not plain


def test_the_weights_on_disk_are_those_of_the_smaller_model(opened: dict[str, Opened]) -> None:
    found = opened["llama-gqa-uneven"]
    stored = load_file(found.reference.folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == found.parameters


def test_tied_embeddings_are_stored_once(opened: dict[str, Opened]) -> None:
    for how in ("halved", "uneven"):
        folder = opened[f"llama-tied-{how}"].reference.folder
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        model, _ = load(str(folder))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_head_dim_is_written_when_heads_went(opened: dict[str, Opened]) -> None:
    for name in ("llama-gqa-halved", "llama-gqa-uneven", "qwen2-halved", "gpt-neox-uneven"):
        config = json.loads((opened[name].reference.folder / "config.json").read_text())
        assert config["head_dim"] == 12


def test_sizes_of_layers_are_those_of_the_plan(opened: dict[str, Opened]) -> None:
    folder = opened["mistral-uneven"].reference.folder
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    for layer in range(2):
        own = config["per_layer_config"][str(layer)]
        assert own["intermediate_size"] == stored[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0] < 40
        heads = stored[f"model.layers.{layer}.self_attn.q_proj.weight"].shape[0] // 12
        assert own.get("num_attention_heads", 4) == heads == 2 * own.get("num_key_value_heads", 2)


def test_without_trust_an_uneven_folder_is_refused_not_misread(opened: dict[str, Opened]) -> None:
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(opened["llama-gqa-uneven"].reference.folder)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "mixtral"])
def test_secateur_opens_uneven_folders_without_running_their_code(
    name: str, opened: dict[str, Opened], tmp_path: Path
) -> None:
    reference = opened[f"{name}-uneven"].reference
    for file in reference.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "modeling_pruned.py").unlink()
    (tmp_path / "modeling_pruned.py").write_text("raise SystemExit('executed')")
    model, _ = load(str(tmp_path))
    with torch.no_grad():
        assert (model(reference.ids).logits - reference.logits).abs().max() <= 1e-5


def test_saving_what_secateur_opened_writes_the_modelling_file_again(opened: dict[str, Opened], tmp_path: Path) -> None:
    reference = opened["qwen3-uneven"].reference
    model, _ = load(str(reference.folder))
    model.save_pretrained(tmp_path / "again")
    for file in ("modeling_pruned.py", "config.json"):
        assert (tmp_path / "again" / file).read_text() == (reference.folder / file).read_text()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-new"])
def test_adapters_can_be_trained_merged_and_saved_by_others(
    name: str, opened: dict[str, Opened], tmp_path: Path
) -> None:
    folder = opened[f"{name}-uneven"].reference.folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    with torch.no_grad():
        assert (again(IDS).logits - merged(IDS).logits).abs().max() <= 1e-5
        again.set_attn_implementation("eager")
        assert (again(IDS).logits - merged(IDS).logits).abs().max() <= 1e-4


def test_an_uneven_model_can_be_built_without_weights(opened: dict[str, Opened]) -> None:
    folder = opened["gemma2-uneven"].reference.folder
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    built = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=True)
    assert [tuple(p.shape) for p in built.parameters()] == [tuple(p.shape) for p in loaded.parameters()]
    assert all(parameter.isfinite().all() for parameter in built.parameters())


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "mistral", "gpt2", "bloom", "phi3"])
def test_a_pruned_model_can_be_pruned_again(name: str, opened: dict[str, Opened], tmp_path: Path) -> None:
    model, _ = load(str(opened[f"{name}-uneven"].reference.folder))
    graph = trace(model)
    kept = {g.name: list(range(g.size - 1)) for g in graph.prunable if g.size > 1}
    slice_model(model, graph, kept)
    write(model, None, tmp_path, graph=graph, kept=kept)
    again, _ = load(str(tmp_path))
    with torch.no_grad():
        assert (again(IDS).logits - model(IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "qwen3-moe"])
def test_layers_that_become_even_again_need_no_code(name: str, opened: dict[str, Opened], tmp_path: Path) -> None:
    model, _ = load(str(opened[f"{name}-uneven"].reference.folder))
    graph = trace(model)
    smallest: dict[str, int] = {}
    for group in graph.prunable:
        part = group.name.split(".", 2)[2]
        smallest[part] = min(group.size, smallest.get(part, group.size))
    kept = {g.name: list(range(smallest[g.name.split(".", 2)[2]])) for g in graph.prunable}
    slice_model(model, graph, kept)
    write(model, None, tmp_path, graph=graph, kept=kept)
    assert not (tmp_path / "modeling_pruned.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (again(IDS).logits - model(IDS).logits).abs().max() <= 1e-5


def test_a_plan_that_removes_nothing_gives_the_same_config_back(tmp_path: Path) -> None:
    model = TINY["qwen2"]()
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "saved").mkdir()
    write(model, None, tmp_path / "saved", graph=trace(model), kept={})
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_the_whole_save(tmp_path: Path) -> None:
    """In bfloat16, in shards, with a tokenizer and a chat template; the model in memory stays as it is."""
    model, graph, kept = cut("llama-odd", uneven)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    settings = ExportSettings(dtype="bfloat16", max_shard_size="20KB")
    seen: list[Path] = []
    stale = tmp_path / "deep" / ".out.saving"  # as a run leaves it that was killed while it saved
    (stale / "secateur").mkdir(parents=True)
    (stale / "model-00099.safetensors").write_text("half")
    (tmp_path / "deep" / "out").mkdir()
    verification = save_folder(
        model,
        tiny_tokenizer(chat=True),
        tmp_path / "deep" / "out",
        graph=graph,
        kept=kept,
        settings=settings,
        complete=lambda folder, _: seen.append(folder),
    )
    out = tmp_path / "deep" / "out"
    assert verification.dtype == "bfloat16"
    assert verification.tokens_in_a_sentence == 44
    assert verification.sample
    assert Verification.model_validate_json((out / "secateur" / "verification.json").read_text()) == verification
    assert len(list(out.glob("*.safetensors"))) > 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert seen == [stale]
    assert not (out / "model-00099.safetensors").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert model.config.to_dict() == config
    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float16)
    assert half.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 25)
    assert load(str(out))[0].stored_dtype == torch.bfloat16


def test_a_folder_that_needs_secateur_does_not_verify(opened: dict[str, Opened]) -> None:
    with pytest.raises(VerificationError, match=r"does not open .* must not be needed"):
        opened["needs-secateur"].judged()


def test_a_folder_with_other_weights_does_not_verify(opened: dict[str, Opened]) -> None:
    with pytest.raises(VerificationError, match="computes something else"):
        opened["damaged"].judged()


def test_a_save_that_does_not_verify_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reference: Reference) -> Verification:
        assert (reference.folder / "model.safetensors").is_file()
        raise VerificationError("no")

    monkeypatch.setattr(huggingface, "verify_folder", refuse)
    model, graph, kept = cut("llama-gqa", halved)
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new", tmp_path / "there"):
        with pytest.raises(VerificationError):
            save_folder(model, None, folder, graph=graph, kept=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_a_full_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model, graph, kept = cut("llama-gqa", halved)
    with pytest.raises(InputError, match="not empty"):
        save_folder(model, None, tmp_path, graph=graph, kept=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_graph_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, graph, kept = cut("llama-gqa", halved)
    name = next(iter(kept))
    with pytest.raises(ModelError, match="not what the plan leaves"):
        write(model, None, tmp_path, graph=graph, kept={**kept, name: kept[name][:-1]})
    with pytest.raises(ModelError, match="adapters"):
        write(get_peft_model(model, LoraConfig(target_modules="all-linear")), None, tmp_path, graph=graph, kept=kept)
    assert not list(tmp_path.iterdir())

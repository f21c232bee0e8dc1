"""Folders with a LoRA adapter: merged to what they compute, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from secateur.errors import InputError, ModelError
from secateur.loading import load, opening, outline
from secateur.testing.tiny import build


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


# Head and embedding that are one tensor in the base


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 40, 96]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5], "embed_tokens": [7]}}, False),
        ({"target_modules": ["lm_head", "q_proj"], "use_dora": True}, False),
        ({"target_modules": ["lm_head", "o_proj"], "use_rslora": True, "rank_pattern": {".*o_proj": 2}}, False),
        ({"target_modules": ["q_proj", "down_proj"]}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama-tied", "gemma3-vision"])
def test_an_adapter_of_a_tied_model_is_merged_to_what_it_computes(
    family: str, kind: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    build_tied(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **copy.deepcopy(kind))
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.tensor([[5, 7, 40, 96, *range(8, 20)]])
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits
        merged, _ = load(str(tmp_path / "adapter"), device="cpu")
        torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)
        assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
        assert merged.config.tie_word_embeddings is tied
        assert merged.config.get_text_config().tie_word_embeddings is tied
        merged.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)
    assert merged.source_folder == tmp_path / "base"


def build_tied(family: str) -> PreTrainedModel:
    """A tied model, whose config is one or has one for text within."""
    if family == "llama-tied":
        return build(family)
    from secateur.testing import zoo

    model, _ = zoo.build_any("gemma3")
    assert model.config.tie_word_embeddings
    return model


def test_a_merge_that_computes_something_else_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    merge = PeftModel.__getattr__

    def wrong(self: PeftModel, name: str) -> Any:
        if name == "merge_and_unload":
            return self.base_model.unload  # which forgets the adapter
        return merge(self, name)

    monkeypatch.setattr(PeftModel, "__getattr__", wrong)
    with pytest.raises(ModelError, match=r"does not fit its base model.*computes something else.*logits differ"):
        load(str(adapter), device="cpu")


def test_an_adapter_whose_base_lay_elsewhere_says_that_it_is_one(adapter: Path) -> None:
    change_adapter(adapter, base_model_name_or_path="/scratch/job-17/llama")
    for opener in (load, outline):
        with pytest.raises(ModelError, match=r"is an adapter of /scratch/job-17/llama, which cannot be opened"):
            opener(str(adapter))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is .* must be a text"),
        ({"revision": 7}, "revision is 7; it must be a text"),
        ({"base_model_name_or_path": "~nobody-here/x"}, "base model of .* is no path"),
        ({"r": "many"}, "r is 'many'; it must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a number"),
        ({"modules_to_save": 3}, "modules_to_save is 3; it must be a list"),
        ({"target_modules": {"a": 1}}, "target_modules is .*it must be a list"),
        ({"trainable_token_indices": "all"}, "trainable_token_indices is 'all'; it must be a list"),
        ({"alpha_pattern": "x"}, "alpha_pattern is 'x'; it must be an object"),
    ],
)
def test_wrong_types_in_an_adapters_settings(changes: dict[str, Any], message: str, adapter: Path) -> None:
    change_adapter(adapter, **changes)
    with pytest.raises(ModelError, match=message):
        load(str(adapter), device="cpu")


def test_an_adapters_files_are_read_as_foreign(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key: value.to(torch.int32) for key, value in weights.items()}, file)
    for opener in (load, outline):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors holds the weight .* as I32"):
            opener(str(adapter))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged or cut off"):
        load(str(adapter))
    (adapter / "adapter_config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(ModelError, match=r"adapter_config\.json is nested too deep"):
        load(str(adapter))

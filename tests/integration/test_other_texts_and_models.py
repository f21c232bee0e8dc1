"""What LoRAShear's paper leaves open: text that is not English, models that are no Llama, models with a domain."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import secateur
from secateur.config import Recipe, load_recipe
from secateur.testing.tiny import TINY, randomise
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.training import LoraSettings, attach_lora

SCRIPTS = {
    "bulgarian": "писмото дойде късно и никой в къщата не попита кой го беше написал онази зима",
    "chinese": "信 来 得 很 晚 屋 里 没 有 人 问 是 谁 写 的 七 艘 船 在 黎 明 前 离 开 港 口",
    "arabic": "وصلت الرسالة متأخرة ولم يسأل أحد في البيت من الذي كتبها في ذلك الشتاء البارد",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: what byte-level tokenizers fall back to in scripts that they did not learn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def with_bytes(name: str) -> PreTrainedModel:
    model = TINY[name]()
    model.resize_token_embeddings(256)
    randomise(model)
    return model


def written(folder: Path, script: str) -> Path:
    """Paragraphs of shuffled words, as a .txt, or as .jsonl with escapes where there are no spaces between words."""
    draw, words = random.Random(script), SCRIPTS[script].split()
    between = "" if script == "chinese" else " "
    paragraphs = [between.join(draw.choices(words, k=60)) for _ in range(240)]
    if script == "chinese":
        path = folder / f"{script}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in paragraphs), encoding="utf-8")
    else:
        path = folder / f"{script}.txt"
        path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def recipe_on(*files: Path, **more: Any) -> Recipe:
    text = ",".join(map(str, files))
    settings = [
        "method=lorashear",
        "method.period_steps=2",
        "recovery.steps=4",
        "recovery.tokens=1024",
        "recovery.round_steps=2",
    ]
    settings += ["recovery.validation_tokens=96", "calibration.tokens=128", "evaluation.tokens=128"]
    settings += ["evaluation.speed=false", "evaluation.baseline=null", "training.precision=fp32"]
    settings += [
        f"{part}.{key}" for part in ("calibration", "recovery", "evaluation") for key in (f"text=[{text}]", "window=16")
    ]
    return load_recipe(None, [*settings, *(f"{key}={value}" for key, value in more.items())])


def test_text_in_other_scripts_goes_through_the_whole_pipeline(tmp_path: Path) -> None:
    files = [written(tmp_path, script) for script in SCRIPTS]
    tokenizer = byte_tokenizer()
    sentence = SCRIPTS["arabic"]
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    result = secateur.prune(with_bytes("llama-gqa"), tokenizer, recipe=recipe_on(*files), output=tmp_path / "out")
    for state in ("dense", "pruned", "recovered"):
        assert {Path(name).stem for name in result.metrics[state]["perplexity"]} == set(SCRIPTS)
    assert {Path(name).stem for name in result.metrics["recovery"]["rounds"][-1]["weights"]} == set(SCRIPTS)
    model, again = secateur.load(str(tmp_path / "out"), device="cpu")
    assert again is not None
    ids = torch.tensor([again(SCRIPTS["bulgarian"])["input_ids"]])
    torch.testing.assert_close(model(ids).logits, result.model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "qwen3-moe", "olmo2"])
def test_models_that_are_no_llama(family: str, tmp_path: Path) -> None:
    """Analysis, LHSPG, the cut and dynamic recovery: nothing of it is about one family."""
    text = written(tmp_path, "bulgarian")
    result = secateur.prune(with_bytes(family), byte_tokenizer(), recipe=recipe_on(text))
    assert result.plan.parameters_after < result.plan.parameters_before
    assert len(result.metrics["recovery"]["rounds"]) >= 2


def test_a_model_with_a_domain_of_its_own_as_an_adapter(tmp_path: Path) -> None:
    """A fine-tuned adapter is merged when it is opened, and pruned with the domain's own text."""
    base = TINY["llama-gqa"]()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = attach_lora(base, LoraSettings(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "domain")
    tuned, tokenizer = secateur.load(str(tmp_path / "domain"), device="cpu")
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(tuned(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    notes = tmp_path / "notes.txt"
    draw = random.Random(0)
    words = "patient presents with acute pain after surgery dose reduced no fever".split()
    notes.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(240)))
    recipe = recipe_on(notes, **{"recovery.steps": 30, "training.learning_rate": 0.01})
    result = secateur.prune(tuned, tokenizer, recipe=recipe, output=tmp_path / "out")
    numbers = {state: result.metrics[state]["perplexity"][str(notes)] for state in ("pruned", "recovered")}
    assert numbers["recovered"] < 0.8 * numbers["pruned"]

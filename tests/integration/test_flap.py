"""FLAP from end to end: the biases are in the folder, which opens and computes the same, and can be pruned again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import secateur
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

TEXT = "A hedge is cut twice a year, in early summer and in autumn; each cut is to leave a few leaves on every shoot. "


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "gpt2"])
def test_biases_are_saved_and_opened(family: str, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} {TEXT * 3}"}) + "\n" for number in range(60)))
    sections = ("calibration", "recovery", "evaluation")
    overrides = [f"{section}.{key}" for section in sections for key in (f"text={file}", "window=12", "tokens=192")]
    overrides += ["recovery.steps=2", "evaluation.speed=false", "evaluation.baseline=null"]
    recipe = secateur.load_recipe(None, overrides)
    model, tokenizer = build(family), tiny_tokenizer()
    result = secateur.prune(model, tokenizer, ratio=0.3, method="flap", recipe=recipe, output=tmp_path / "out")
    changed = [
        name for name, value in result.model.named_parameters() if name.endswith("down_proj.bias") and value.any()
    ]
    assert family == "gpt2" or changed
    assert not result.updates  # they are in the weights now
    opened, _ = secateur.load(str(tmp_path / "out"), trust_remote_code=True)
    assert set(opened.state_dict()) == set(result.model.state_dict())
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)
    added = set(opened.state_dict()) - set(build(family).state_dict())
    assert all(name.endswith(".bias") for name in added)
    assert bool(added) == (family != "gpt2")  # which has biases everywhere

    again = secateur.prune(opened, ratio=0.1, method="random")
    secateur.save(again, tmp_path / "again")
    twice, _ = secateur.load(str(tmp_path / "again"), trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(twice(ids).logits, again.model(ids).logits, rtol=1e-4, atol=1e-4)

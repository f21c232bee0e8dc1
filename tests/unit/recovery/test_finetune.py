"""Recovery trains adapters or all weights, at its own learning rate, and a killed one ends like an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.data import TokenBlocks
from secateur.data.order import ReadingOrder
from secateur.evaluation import losses_by_source
from secateur.recovery import RecoverySettings, RecoveryTask, finetune, recover
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, TrainingSettings, attach_lora, merge_lora, train

TRAINING = TrainingSettings(batch_size=2, micro_batch_size=2, precision="fp32", checkpoint_steps=2)


def _blocks(count: int = 12) -> TokenBlocks:
    ids = torch.randint(3, 20, (count, 12), generator=torch.Generator().manual_seed(0))
    return TokenBlocks(ids, ("a",) * count)


def _recover(task: RecoveryTask, family: str = "llama-tied", steps: int = 8, **settings: Any) -> Any:
    model = TINY[family]()
    chosen = RecoverySettings(steps=steps, window=12, **settings)
    done = recover(model, task, chosen, lora=LoraSettings(rank=2), training=TRAINING, seed=0)
    return model, done


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, TRAINING.learning_rate),
        ({"finetuning": "full"}, 1e-4),
        ({"learning_rate": 3e-3}, 3e-3),
        ({"finetuning": "full", "learning_rate": 3e-3}, 3e-3),
    ],
)
def test_the_peak_learning_rate_is_that_of_what_is_trained(settings: dict[str, Any], rate: float) -> None:
    _, done = _recover(RecoveryTask(text=_blocks()), **settings)
    assert max(entry["learning_rate"] for entry in done.log) == pytest.approx(rate)


def test_all_weights_learn_and_tied_ones_stay_tied() -> None:
    blocks, model = _blocks(), TINY["llama-tied"]()
    before = losses_by_source(model, blocks, batch_size=4, autocast=None)["a"].loss
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model, _ = _recover(RecoveryTask(text=blocks), finetuning="full", learning_rate=1e-3)
    assert losses_by_source(model, blocks, batch_size=4, autocast=None)["a"].loss < before
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, fresh[name])]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_checkpoints_of_all_weights_count_on_the_disk() -> None:
    full = RecoverySettings(steps=5, finetuning="full")
    assert full.disk_bytes(1000, TRAINING.model_copy(update={"checkpoint_steps": 50})) == 12_000
    assert full.disk_bytes(1000, TRAINING) == 36_000
    assert RecoverySettings(steps=5).disk_bytes(1000, TRAINING) == 0


def test_links_are_a_chain_of_adapters_that_continue_the_text() -> None:
    blocks = _blocks()
    model, done = _recover(RecoveryTask(text=blocks), steps=8, links=3)
    chain, order = TINY["llama-tied"](), ReadingOrder(("all",) * 12, {"all": 1.0}, 0)
    begin, rates = 0, []
    for link, steps in enumerate([2, 3, 3]):
        rows = [order(position) for position in range(2 * begin, 2 * (begin + steps))]
        adapted = attach_lora(chain, LoraSettings(rank=2), seed=link)
        options: dict[str, Any] = {"steps": steps, "seed": 0, "description": "", "order": rows.__getitem__}
        rates += [entry["learning_rate"] for entry in train(adapted, blocks.ids, TRAINING, **options)]
        merge_lora(adapted)
        begin += steps
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in chain.state_dict().items())
    assert [entry["step"] for entry in done.log] == list(range(1, 9))
    assert [entry["learning_rate"] for entry in done.log] == rates  # a schedule for each


@pytest.mark.parametrize("dies_in", [0, 1, 2])
def test_a_killed_chain_ends_like_an_undisturbed_one(
    dies_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 9, "links": 3, "teacher": 1.0, "hidden_weight": 0.1}
    whole, done = _recover(RecoveryTask(_blocks(), teacher=TINY["llama-tied"]()), **settings)
    loss, calls = finetune.Distillation.__call__, [0]

    def dies(self: Any, model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3 * dies_in + 3:
            raise KeyboardInterrupt
        return loss(self, model, ids, step)

    task = RecoveryTask(_blocks(), teacher=TINY["llama-tied"](), checkpoints=tmp_path)
    monkeypatch.setattr(finetune.Distillation, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        _recover(task, **settings)
    calls[0] = 100
    resumed, again = _recover(task, **settings)
    assert calls[0] == 100 + 9 - 3 * dies_in - 2
    assert again.log == done.log
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetuning": "full"}, "finetuning=lora"),
        ({"round_steps": 2}, "round_steps=0"),
        ({"instructions": ["self"]}, "no instructions"),
        ({"steps": 1}, r"links \(2\) must be at most steps \(1\)"),
    ],
)
def test_links_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RecoverySettings.model_validate({"links": 2, **settings})

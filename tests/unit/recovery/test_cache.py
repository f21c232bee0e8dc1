"""Predictions on disk teach what the dense model teaches, are those of the windows to be read, and survive a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.recovery import CachedTeacher, RecoverySettings, RecoveryTask, cache, keep_predictions, recover
from secateur.recovery.distill import Distillation, LiveTeacher
from secateur.testing.tiny import VOCAB, build
from secateur.training import LoraSettings, TrainingSettings

TRAINING = TrainingSettings(batch_size=2, micro_batch_size=2, precision="fp32")
IDS = torch.randint(3, 40, (40, 12), generator=torch.Generator().manual_seed(0))


def _cached(k: int, folder: Path | None = None, ids: torch.Tensor = IDS) -> CachedTeacher:
    return CachedTeacher.make(build("llama-tied"), ids, k, folder=folder, batch=4)


@pytest.mark.parametrize("skew", [0.0, 0.2])
def test_with_the_whole_vocabulary_it_teaches_as_the_model_itself(skew: float) -> None:
    teacher, student = build("llama-tied"), build("llama-tied", seed=1)
    found = []
    for one in (LiveTeacher(teacher), _cached(VOCAB)):
        student.zero_grad()
        loss = Distillation(one, 0.8, skew=skew)(student, IDS[17:20], 0)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-3, atol=0)  # log-probabilities have 16 bits
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("k", [1, 8, 50])
def test_all_other_tokens_are_one_bucket(k: int) -> None:
    teacher, student, ids = build("llama-tied"), build("llama-tied", seed=1), IDS[:2]
    p = teacher(ids).logits[:, :-1].double().softmax(-1).detach()
    q = student(ids).logits[:, :-1].double().softmax(-1)
    top, tokens = p.topk(k, -1)
    of_student = q.gather(-1, tokens)
    p = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    q = torch.cat([of_student, 1 - of_student.sum(-1, keepdim=True)], -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    found = Distillation(_cached(k), 1.0)(student, ids, 0)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)


def test_cross_entropy_still_sees_every_token() -> None:
    student = build("llama-tied", seed=1)
    found = Distillation(_cached(1), 0.0)(student, IDS[:2], 0)
    logits = student(IDS[:2]).logits[:, :-1]
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), IDS[:2, 1:].flatten()))


@pytest.mark.parametrize(
    ("settings", "windows"), [({}, 6), ({"steps": 30}, 40), ({"round_steps": 2, "validation_tokens": 12}, 40)]
)
def test_the_windows_that_are_read_are_kept(
    settings: dict[str, Any], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    likeliest = cache._likeliest

    def spy(teacher: Any, ids: torch.Tensor, *rest: Any) -> Any:
        kept.append(len(ids))
        return likeliest(teacher, ids, *rest)

    monkeypatch.setattr(cache, "_likeliest", spy)
    chosen = RecoverySettings.model_validate(
        {"steps": 3, "window": 12, "text": "a", "teacher": 1, "teacher_cache": 5, **settings}
    )
    task = RecoveryTask(text=TokenBlocks(IDS, ("a",) * 40))
    options: dict[str, Any] = {"training": TRAINING, "seed": 3}
    teacher = keep_predictions(build("llama-tied"), task, chosen, folder=None, **options)
    assert sum(kept) == windows
    recover(
        build("llama-tied", seed=1), RecoveryTask(task.text, teacher=teacher), chosen, lora=LoraSettings(), **options
    )


def test_recovery_ends_the_same_with_the_model_and_with_its_predictions() -> None:
    settings = RecoverySettings(steps=6, window=12, teacher=1.0, teacher_cache=VOCAB)
    text, trained = TokenBlocks(IDS, ("a",) * 40), []
    options: dict[str, Any] = {"training": TRAINING, "seed": 0}
    kept = keep_predictions(build("llama-tied"), RecoveryTask(text), settings, folder=None, **options)
    for teacher in (build("llama-tied"), kept):
        model = build("llama-tied", seed=1)
        recover(model, RecoveryTask(text, teacher=teacher), settings, lora=LoraSettings(rank=2), **options)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=2e-3, rtol=0)


def test_whole_files_of_an_interrupted_run_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = _cached(5).read(IDS).at(slice(0, 11))
    likeliest, made = cache._likeliest, []

    def dies(teacher: Any, ids: torch.Tensor, *rest: Any) -> Any:
        made.append(len(ids))
        if len(made) == 3:
            raise KeyboardInterrupt
        return likeliest(teacher, ids, *rest)

    monkeypatch.setattr(cache, "_likeliest", dies)
    with pytest.raises(KeyboardInterrupt):
        _cached(5, tmp_path)
    first = tmp_path / "00000.safetensors"
    first.write_bytes(first.read_bytes()[:-7])  # damaged: it counts as missing
    resumed = _cached(5, tmp_path).read(IDS).at(slice(0, 11))
    assert made == [16, 16, 8, 16, 8]
    assert torch.equal(resumed.log_p, undisturbed.log_p)
    assert resumed.tokens is not None
    assert undisturbed.tokens is not None
    assert torch.equal(resumed.tokens, undisturbed.tokens)
    _cached(6, tmp_path)  # another k: made again
    assert made == [16, 16, 8, 16, 8, 16, 16, 8]


def test_the_model_is_left_as_it_was() -> None:
    model = build("gpt2").train()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    teacher = CachedTeacher.make(model, IDS[:2], 5, folder=None, batch=4)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["transformer.wte.weight"]
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    folder = teacher._folder
    assert folder.is_dir()
    del teacher
    assert not folder.exists()


def test_what_is_not_kept_is_refused() -> None:
    with pytest.raises(ModelError, match="has not read"):
        _cached(5, ids=IDS[:3]).read(IDS[3:5])
    with pytest.raises(ValueError, match="teacher_cache=0"):
        RecoverySettings(teacher=1.0, teacher_cache=5, hidden_weight=0.1)
    with pytest.raises(ValueError, match=r"teacher_cache \(5\) compares with a teacher"):
        RecoverySettings(teacher_cache=5)


def test_the_size_on_disk_is_known_before(tmp_path: Path) -> None:
    _cached(7, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written == pytest.approx(cache.cache_bytes(40, 12, 7), rel=0.2, abs=4000)
    settings = RecoverySettings(steps=3, window=12, tokens=480, teacher=1.0, teacher_cache=7)
    assert settings.disk_bytes(1000, TRAINING) == cache.cache_bytes(6, 12, 7)
    assert settings.model_copy(update={"steps": 99}).disk_bytes(1000, TRAINING) == cache.cache_bytes(40, 12, 7)

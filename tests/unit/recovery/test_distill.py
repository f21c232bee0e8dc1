"""The loss against the dense model and its gradient are those of the definition, for pieces of any size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import token_loss
from secateur.config import load_recipe
from secateur.data import TokenBlocks
from secateur.errors import InputError, ModelError
from secateur.recovery import RecoverySettings, RecoveryTask, recover
from secateur.recovery.distill import Distillation, LiveTeacher, hidden_error
from secateur.testing.largest_logits import LargestLogits
from secateur.testing.tiny import TINY, VOCAB, build
from secateur.training import LoraSettings, TrainingSettings, attach_lora, full_weights

WINDOW = 12
IDS = torch.randint(3, 40, (3, WINDOW), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_ROWS", 1)
    monkeypatch.setattr(
        token_loss, "_LOGITS", 4 * 3 * VOCAB
    )  # four positions of three windows: the last piece is short


def _by_definition(student: Any, teacher: Any, weight: float, skew: float) -> torch.Tensor:
    q = student(IDS).logits[:, :-1].double().softmax(-1)
    p = teacher(IDS).logits[:, :-1].double().softmax(-1).detach()
    kl = (p * (p / (skew * p + (1 - skew) * q)).log()).sum(-1).mean()
    ce = -q.gather(-1, IDS[:, 1:, None]).log().mean()
    return (1 - weight) * ce + weight * kl


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("weight", "skew"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (1.0, 0.1), (0.5, 0.7)])
@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "mixtral"])
@pytest.mark.parametrize("adapters", [True, False])
def test_loss_and_gradient_are_those_of_the_definition(family: str, adapters: bool, weight: float, skew: float) -> None:
    teacher, student = build(family), build(family, seed=1)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(2.0)
    trained: Any = attach_lora(student, LoraSettings(rank=2), seed=0) if adapters else student
    expected = _by_definition(trained, teacher, weight, skew)
    expected.backward()
    theirs = _gradients(trained)
    loss = Distillation(LiveTeacher(teacher), weight, skew=skew)(trained, IDS, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    _assert_same(_gradients(trained), theirs)
    assert not any(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("positions", [1, 4, 11, 1000])
def test_the_number_of_positions_in_a_piece_changes_nothing(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, found = build("llama-tied"), build("llama-tied", seed=1), []
    for size in (positions, 3):
        monkeypatch.setattr(token_loss, "_LOGITS", size * 3 * VOCAB)
        loss = Distillation(LiveTeacher(teacher), 0.5)(student, IDS, 0)
        (2 * loss).backward()
        found.append((loss.detach(), _gradients(student)))
    torch.testing.assert_close(found[0][0], found[1][0])
    _assert_same(found[0][1], found[1][1])


def test_a_model_that_cannot_be_split_has_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, found = build("llama-gqa"), build("llama-gqa", seed=1), []
    for _ in range(2):
        loss = Distillation(LiveTeacher(teacher), 1.0, hidden_weight=0.5, hidden_steps=1)(student, IDS, 0)
        loss.backward()
        found.append((loss.detach(), _gradients(student)))
        monkeypatch.setattr(token_loss, "split_model", lambda *_: None)
    torch.testing.assert_close(found[0][0], found[1][0])
    _assert_same(found[0][1], found[1][1])


def test_dropout_does_not_prevent_the_split() -> None:
    student: Any = build("gpt2", seed=1).train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in student.modules())
    reading = token_loss.LogitReader(student, IDS).start(IDS)
    assert reading.states.shape[-1] == student.config.n_embd
    assert student.training


def test_no_tensor_has_the_logits_of_a_whole_window() -> None:
    teacher, student = build("llama-gqa"), build("llama-gqa", seed=1)
    loss = Distillation(LiveTeacher(teacher), 1.0)
    loss(student, IDS, 0)  # tries whether the models can be split
    with LargestLogits() as ours:
        loss(student, IDS, 0).backward()
    assert 0 < ours.most <= token_loss._LOGITS
    with LargestLogits() as whole:
        _by_definition(student, teacher, 1.0, 0.0).backward()
    assert whole.most == IDS.numel() * VOCAB


def test_the_teacher_alone_needs_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "nll_loss", lambda *_, **__: pytest.fail("cross-entropy was computed"))
    assert float(Distillation(LiveTeacher(build("llama-gqa")), 1.0)(build("llama-gqa", seed=1), IDS, 0)) > 0


def test_skew_bounds_the_gradient_of_an_improbable_token() -> None:
    teacher, student = build("llama-gqa"), build("llama-gqa", seed=1)
    with torch.no_grad():
        student.lm_head.weight.mul_(1000.0)
    found = []
    for skew in (0.0, 0.1):
        loss = Distillation(LiveTeacher(teacher), 1.0, skew=skew)(student, IDS, 0)
        found.append(float(loss))
    assert found[1] <= -torch.tensor(0.1).log() < found[0]  # KL(p || skew p + …) is at most −log(skew)


@pytest.mark.parametrize("family", ["llama-odd", "gemma2", "gpt2"])
def test_hidden_states_are_compared_in_the_first_steps_only(family: str) -> None:
    teacher, student = build(family).eval(), build(family, seed=1).eval()
    loss = Distillation(LiveTeacher(teacher), 1.0, hidden_weight=0.3, hidden_steps=2)
    plain = Distillation(LiveTeacher(teacher), 1.0)(student, IDS, 0)
    h = student(IDS, output_hidden_states=True).hidden_states[-1].double()
    wanted = teacher(IDS, output_hidden_states=True).hidden_states[-1].double()
    error = ((h - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    for step in (0, 1):
        torch.testing.assert_close(loss(student, IDS, step).double(), plain + 0.3 * error, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss(student, IDS, 2), plain)
    (loss(student, IDS, 0) - loss(student, IDS, 2)).backward()
    ours = _gradients(student)
    (0.3 * error).backward()
    theirs = _gradients(student)
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_every_fourth_layer_counts() -> None:
    dense = tuple(torch.ones(1, 2, 3) for _ in range(10))  # nine layers
    for layer in range(10):
        student = tuple(2 * h if i == layer else h for i, h in enumerate(dense))
        assert float(hidden_error(student, dense)) == pytest.approx(1 / 3 if layer in (4, 8, 9) else 0)


def test_streams_of_other_sizes_are_refused() -> None:
    teacher, student = build("llama-gqa"), build("llama-odd")
    with pytest.raises(ModelError, match=r"hidden_weight=0"):
        Distillation(LiveTeacher(teacher), 1.0, hidden_weight=1.0, hidden_steps=1)(student, IDS, 0)
    for kinds in ("hidden", "[ffn,layer]"):
        with pytest.raises(InputError, match=r"hidden_weight is 0\.2 and budget\.kinds has"):
            load_recipe(None, ["recovery.hidden_weight=0.2", "recovery.teacher=1", f"budget.kinds={kinds}"])
    with pytest.raises(InputError, match=r"budget\.kinds has layer"):
        load_recipe(None, ["recovery.hidden_weight=0.2", "recovery.teacher=1", "method=shortgpt"])


@pytest.mark.parametrize("key", ["skew", "hidden_weight"])
def test_what_needs_a_teacher_is_refused_without(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} .* set teacher above 0"):
        RecoverySettings.model_validate({key: 0.1})


@pytest.mark.parametrize(("finetuning", "rate"), [("lora", 0.01), ("full", 2e-3)])
def test_with_the_teacher_alone_a_broken_model_comes_nearer_and_accumulation_changes_nothing(
    finetuning: str, rate: float
) -> None:
    ids = torch.randint(3, 9, (16, 12), generator=torch.Generator().manual_seed(0))
    blocks, found = TokenBlocks(ids, ("a",) * 16), []
    for micro in (4, 2):
        teacher, model = TINY["llama-gqa"](), TINY["llama-gqa"]()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, ::2] = 0
        before = float(Distillation(LiveTeacher(teacher), 1.0)(model, ids, 0))
        training = TrainingSettings(batch_size=4, micro_batch_size=micro, precision="fp32")
        settings = RecoverySettings.model_validate(
            {"steps": 6, "window": 12, "teacher": 1.0, "finetuning": finetuning, "learning_rate": rate}
        )
        task = RecoveryTask(text=blocks, teacher=teacher)
        recover(model, task, settings, lora=LoraSettings(rank=4), training=training, seed=0)
        assert float(Distillation(LiveTeacher(teacher), 1.0)(model, ids, 0)) < 0.9 * before
        found.append(copy.deepcopy(model.state_dict()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=0)


def test_under_autocast_the_loss_is_nearly_the_same_and_master_weights_have_float32_gradients() -> None:
    teacher, student = build("llama-tied"), build("llama-tied", seed=1)
    exact = Distillation(LiveTeacher(teacher), 1.0)(student, IDS, 0)
    with full_weights(student), torch.autocast("cpu", dtype=torch.bfloat16):
        low = Distillation(LiveTeacher(teacher, torch.bfloat16), 1.0)(student, IDS, 0)
        low.backward()
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in student.parameters())
    assert low.dtype is torch.float32
    assert float(low.detach()) == pytest.approx(float(exact.detach()), rel=0.03)

"""LoRA goes on and comes off without a trace; the Trainer trains only the adapters, or all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from secateur.errors import InputError, ModelError
from secateur.testing.tiny import TINY, VOCAB
from secateur.training import LoraSettings, TrainingSettings, attach_lora, full_weights, merge_lora, train

IDS = torch.randint(0, VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "phi3"])
def test_merged_is_what_was_trained(name: str) -> None:
    model = TINY[name]()
    adapted = attach_lora(model, LoraSettings(rank=2), seed=0)
    frozen = {key: value.clone() for key, value in adapted.state_dict().items() if ".lora_" not in key}
    settings = TrainingSettings(learning_rate=0.05, precision="fp32")
    log = train(adapted, IDS, settings, steps=4, seed=0, description="training")
    assert log
    assert all(torch.equal(adapted.state_dict()[key], value) for key, value in frozen.items())
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = merge_lora(adapted)
        assert merged is model
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not [key for key in model.state_dict() if "lora" in key]


def test_the_same_seed_trains_the_same() -> None:
    results = []
    for _ in range(2):
        adapted = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2), seed=1)
        train(adapted, IDS, TrainingSettings(precision="fp32"), steps=3, seed=1, description="training")
        results.append(merge_lora(adapted).state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


class _Gradients(TrainerCallback):
    """The norm of the gradients of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.stack(grads).norm()))


@pytest.mark.parametrize("blocks", [6, 24])
def test_a_finished_training_is_not_repeated(blocks: int, tmp_path: Path) -> None:
    settings, ids = TrainingSettings(precision="fp32", checkpoint_steps=3), IDS.repeat(blocks // 6, 1)
    trained, logs = [], []
    for _ in range(2):
        adapted = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2, dropout=0.1), seed=1)
        watch = _Gradients()
        logs.append(
            train(adapted, ids, settings, steps=4, seed=1, description="", callbacks=[watch], checkpoints=tmp_path)
        )
        trained.append((watch.norms, merge_lora(adapted).state_dict()))
    assert [len(norms) for norms, _ in trained] == [4, 0]
    assert logs[0] == logs[1]
    for name, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][name], value, atol=0, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "mixtral"])
def test_all_weights_take_the_step_of_their_gradient(name: str) -> None:
    settings = TrainingSettings(
        optimizer="sgd", learning_rate=0.1, warmup=0.0, max_grad_norm=0.0, batch_size=6, micro_batch_size=3,
        precision="fp32", gradient_checkpointing=True,
    )  # fmt: skip
    plain, model = TINY[name](), TINY[name]()
    model.requires_grad_(False)
    plain(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    with full_weights(model):
        train(model, IDS, settings, steps=1, seed=0, description="training")
    for (key, before), after in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert before.grad is not None
        assert not torch.equal(after, before), key
        torch.testing.assert_close(after, before - 0.1 * before.grad, atol=1e-6, rtol=1e-4)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "mixtral")


class _KilledError(Exception):
    pass


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise _KilledError


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma2"])
def test_a_killed_training_of_all_weights_ends_like_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    settings = TrainingSettings(precision="fp32", checkpoint_steps=2)

    def trained(folder: str, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
        model = TINY[name]()
        options: dict[str, Any] = {"callbacks": callbacks, "checkpoints": tmp_path / folder}
        with full_weights(model):
            train(model, IDS, settings, steps=7, seed=1, description="", **options)
        return model.state_dict()

    whole = trained("whole")
    with pytest.raises(_KilledError):
        trained("killed", _Kill())
    assert all(torch.equal(value, whole[key]) for key, value in trained("killed").items())
    assert all(torch.equal(value, whole[key]) for key, value in trained("whole").items())  # not repeated


def test_weights_of_16_bits_train_as_float32() -> None:
    low, high = TINY["llama-tied"]().bfloat16(), TINY["llama-tied"]().bfloat16().float()
    settings = TrainingSettings(precision="fp32", learning_rate=1e-4)
    for model in (low, high):
        with full_weights(model):
            train(model, IDS, settings, steps=20, seed=0, description="training")
    assert low.dtype is torch.bfloat16
    for (key, value), exact in zip(low.named_parameters(), high.parameters(), strict=True):
        assert torch.equal(value, exact.bfloat16()), key


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize(("blocks", "batch", "micro"), [(3, 4, 1), (5, 4, 2), (8, 16, 2), (12, 4, 2)])
def test_a_step_reads_a_whole_batch_however_few_blocks_there_are(
    blocks: int, batch: int, micro: int, own_loss: bool
) -> None:
    adapted = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2), seed=0)
    read: list[int] = []
    adapted.register_forward_pre_hook(lambda module, args, more: read.append(len(more["input_ids"])), with_kwargs=True)
    settings = TrainingSettings(batch_size=batch, micro_batch_size=micro, learning_rate=1e-9, precision="fp32")

    def loss(model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    watch, same = _Gradients(), IDS[:1].repeat(blocks, 1)  # any whole batch of one text has the same gradient
    own = loss if own_loss else None
    train(adapted, same, settings, steps=3, seed=0, description="training", callbacks=[watch], loss=own)
    assert read == [micro] * (3 * batch // micro)
    assert watch.norms == pytest.approx([watch.norms[0]] * 3, rel=1e-3)
    one = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2), seed=0)
    one(input_ids=same[:1], labels=same[:1]).loss.backward()
    grads = [parameter.grad.norm() for parameter in one.parameters() if parameter.grad is not None]
    assert watch.norms[0] == pytest.approx(float(torch.stack(grads).norm()), rel=1e-3)


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize(("family", "own_loss"), [("llama-gqa", False), ("llama-gqa", True), ("mixtral", False)])
def test_a_penalty_is_added_to_the_loss_once_a_step_whatever_is_accumulated(
    family: str, own_loss: bool, micro: int
) -> None:
    """A step of SGD moves A by the gradient of the penalty beside that of the loss; Mixtral's has a part of routers."""

    def penalty(model: Any, step: int) -> torch.Tensor:
        assert step == 0
        return torch.stack([p.square().sum() for name, p in model.named_parameters() if ".lora_A." in name]).sum()

    def loss(model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    settings = TrainingSettings(
        batch_size=4,
        micro_batch_size=micro,
        precision="fp32",
        optimizer="sgd",
        learning_rate=0.1,
        warmup=0.0,
        max_grad_norm=0.0,
    )
    trained, logs = [], []
    for given in (None, penalty):
        model = TINY[family]()
        model.config.output_router_logits = True
        adapted = attach_lora(model, LoraSettings(rank=2), seed=0)
        fresh = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
        options: dict[str, Any] = {"loss": loss if own_loss else None, "penalty": given}
        logs.append(train(adapted, IDS, settings, steps=1, seed=0, description="training", **options))
        trained.append({name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad})
    for name, value in trained[0].items():
        expected = value - 0.1 * 2 * fresh[name] if ".lora_A." in name else value
        torch.testing.assert_close(trained[1][name], expected)
    [plain], [penalised] = logs
    squares = sum(float(value.square().sum()) for name, value in fresh.items() if ".lora_A." in name)
    assert penalised.pop("penalty") == pytest.approx(squares, rel=1e-4)
    assert penalised == plain


def test_a_penalty_that_is_not_finite_is_refused() -> None:
    adapted = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2), seed=0)

    def penalty(model: Any, step: int) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    with pytest.raises(ModelError, match="penalty is nan in step 1"):
        train(
            adapted, IDS, TrainingSettings(precision="fp32"), steps=1, seed=0, description="training", penalty=penalty
        )


def test_blocks_are_read_equally_often_when_they_run_out() -> None:
    adapted = attach_lora(TINY["llama-gqa"](), LoraSettings(rank=2), seed=0)
    read: list[int] = []
    adapted.register_forward_pre_hook(
        lambda module, args, more: read.extend(IDS.tolist().index(row) for row in more["input_ids"].tolist()),
        with_kwargs=True,
    )
    train(
        adapted, IDS, TrainingSettings(precision="fp32", batch_size=2), steps=7, seed=0, description="training"
    )  # 14 of 6
    assert sorted(read[:6]) == sorted(read[6:12]) == list(range(6))
    assert read[:6] != read[6:12]


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    with pytest.raises(InputError, match="tied"):
        attach_lora(TINY["llama-tied"](), LoraSettings(targets=("lm_head",)), seed=0)


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="finds no linear"):
        attach_lora(TINY["llama-gqa"](), LoraSettings(targets=("nothing",)), seed=0)


def test_batches_must_add_up() -> None:
    with pytest.raises(ValueError, match="must divide"):
        TrainingSettings(batch_size=6, micro_batch_size=4)

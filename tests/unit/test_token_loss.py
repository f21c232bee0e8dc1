"""Logits in chunks: the gradients of the model's own loss, in every family, with the model's own head code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from secateur import token_loss
from secateur.testing.tiny import TINY, VOCAB
from secateur.token_loss import LogitReader, TokenLoss, split_model
from secateur.training import LoraSettings, attach_lora
from secateur.walk import borrowed, recomputed

CONFIGS: dict[str, dict[str, Any]] = {
    # logits are scaled or capped after the head, by amounts that change gradients visibly at these sizes
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 2.0},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_ROWS", 1)
    monkeypatch.setattr(
        token_loss, "_LOGITS", 3 * VOCAB * 4
    )  # four positions of three windows: the last chunk is short
    monkeypatch.setattr(token_loss, "_ROWS", 1)


def ids() -> torch.Tensor:
    return torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(0))


def built(family: str) -> PreTrainedModel:
    model = TINY[family]()
    for key, value in CONFIGS.get(family, {}).items():
        assert hasattr(model.config, key)
        setattr(model.config, key, value)
        if hasattr(model, key):
            setattr(model, key, value)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def own_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_gradients_are_those_of_the_models_own_loss(family: str) -> None:
    model = built(family)
    loss, theirs = own_gradients(model)
    chunked = TokenLoss(model, ids())
    assert chunked.in_pieces
    assert chunked.backward(ids()) == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), theirs)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "phi"])
def test_adapters_recomputation_and_batches_change_nothing(family: str) -> None:
    """As the LoRA-guided criterion uses it: weights frozen, layers recomputed, one window at a time."""
    model = attach_lora(TINY[family](), LoraSettings(rank=4), seed=0)
    chosen = [name for name, _ in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with borrowed(model, chosen):
        _, theirs = own_gradients(model)
        with recomputed(model):
            loss = TokenLoss(model, ids())
            assert loss.in_pieces
            for window in ids().split(1):
                loss.backward(window, 1 / 3)
        assert_same(gradients(model), theirs)


def test_an_auxiliary_loss_is_kept() -> None:
    model = TINY["mixtral"]()
    model.config.output_router_logits = True
    loss, theirs = own_gradients(model)
    whole = TokenLoss(model, ids())
    assert not whole.in_pieces
    assert split_model(model, ids()) is not None  # it is the loss that is more than that of the logits
    assert whole.backward(ids()) == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), theirs)


def test_a_model_that_mixes_positions_after_its_backbone_is_left_whole() -> None:
    model = TINY["llama-gqa"]()
    model.lm_head = nn.Sequential(model.lm_head, _Smear())
    loss, theirs = own_gradients(model)
    whole = TokenLoss(model, ids())
    assert not whole.in_pieces
    assert whole.backward(ids()) == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), theirs)


class _Smear(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + logits.mean(dim=1, keepdim=True)


def test_no_more_logits_than_one_chunk_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-tied"]()
    seen: list[int] = []
    loss = TokenLoss(model, ids())
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    loss.backward(ids())
    assert max(seen) <= token_loss._LOGITS
    assert sum(seen) >= 11 * 3 * VOCAB  # all of them, the last position of a window apart, and one more trial


def test_a_wide_vocabulary_does_not_make_chunks_of_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk reads the whole head, however few positions it has."""
    monkeypatch.setattr(token_loss, "_LOGITS", VOCAB)  # one position, as a vocabulary as wide as this limit
    monkeypatch.setattr(token_loss, "_ROWS", 12)
    model = TINY["llama-tied"]()
    loss = TokenLoss(model, ids())
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    loss.backward(ids())
    assert [rows for rows in seen if rows > 3] == [12, 12, 9]  # four positions of three windows, and the rest


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["cohere", "gemma2", "gpt2", "llama-tied"])
def test_pieces_without_gradients_are_the_models_own_logits(
    family: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "_READ", 3 * VOCAB * 4)
    model = built(family)
    reader = LogitReader(model, ids())
    assert reader.split is not None
    if whole:
        reader.split = None
    found = torch.full((3, 11, VOCAB), torch.nan)

    def put(rows: slice, here: slice, logits: torch.Tensor) -> None:
        assert logits.numel() <= token_loss._READ
        found[rows, here] = logits

    reader.read(ids(), put)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids()).logits[:, :-1], rtol=1e-4, atol=1e-5)

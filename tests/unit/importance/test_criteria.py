"""Every criterion: agrees with the slow reference, permutes with the units, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import fisher, magnitude, taylor, wanda
from torch import nn

from secateur.data import TokenBlocks
from secateur.errors import DataError, ModelError
from secateur.graph import trace
from secateur.importance import CRITERIA, Fisher, LoRA, Magnitude, Random, Taylor, WandaSP
from secateur.surgery import masked
from secateur.testing.tiny import TINY, VOCAB
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.walk import Calibration

FAMILIES = ["llama-gqa", "llama-bias", "qwen3", "phi3", "gpt2", "falcon-new", "olmo2", "opt"]
MIXTURES = ["mixtral", "qwen3-moe", "gpt-oss"]
CRITERIA_OF_A_PLAIN_MODEL = ["random", "magnitude", "wanda", "taylor", "fisher"]


def blocks(count: int = 6, window: int = 12, seed: int = 0, batch_size: int = 4) -> Calibration:
    ids = torch.randint(3, 48, (count, window), generator=torch.Generator().manual_seed(seed))
    return Calibration(TokenBlocks(ids, ("noise",) * count), batch_size)


def with_lora(model: nn.Module, rank: int = 4) -> nn.Module:
    """LoRA on every linear, with B off its zero start."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted.eval()


def permute(model: nn.Module, group: NodeGroup, order: torch.Tensor) -> None:
    """Let unit i be what unit ``order[i]`` was: the function of the model stays."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for member in group.members:
        tensor = tensors[member.parameter].data
        rows = member.rows(range(group.size))
        tensor.index_copy_(member.axis, rows.flatten(), tensor.index_select(member.axis, rows[order].flatten()))


def assert_same(one: Scores, other: Scores) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("criterion", CRITERIA_OF_A_PLAIN_MODEL)
@pytest.mark.parametrize("family", ["llama-gqa", "phi3", "qwen3-moe"])
def test_one_finite_fp32_number_per_unit(family: str, criterion: str) -> None:
    model = TINY[family]()
    graph = trace(model)
    scores = CRITERIA[criterion]().score(model, graph, blocks(), seed=0)
    assert set(scores) == {group.name for group in graph.prunable}
    for name in scores:
        assert scores[name].shape == (graph[name].size,)
        assert scores[name].dtype == torch.float32
        assert (scores[name] > 0).all()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "fisher"])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_permuting_units_permutes_scores(family: str, criterion: str) -> None:
    model = TINY[family]()
    graph, text = trace(model), blocks()
    before = CRITERIA[criterion]().score(model, graph, text, seed=0)
    logits = model(text.ids).logits.detach()
    orders = {}
    for group in graph.prunable:
        orders[group.name] = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size))
        permute(model, group, orders[group.name])
    torch.testing.assert_close(model(text.ids).logits, logits, rtol=1e-3, atol=1e-4)
    after = CRITERIA[criterion]().score(model, graph, text, seed=0)
    assert_same(after, Scores({name: before[name][order] for name, order in orders.items()}))


@pytest.mark.parametrize("over", ["consumers", "all"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt2", "phi3", "mixtral"])
def test_magnitude_is_the_reference(family: str, over: Any) -> None:
    model = TINY[family]()
    graph = trace(model)
    scores = Magnitude(over=over).score(model, graph, None, seed=0)
    for group in graph.prunable:
        torch.testing.assert_close(
            scores[group.name], torch.tensor(magnitude(model, group, over)), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3", "llama-mqa"])
def test_wanda_is_the_reference(family: str) -> None:
    model, text = TINY[family](), blocks()
    graph = trace(model)
    scores = WandaSP().score(model, graph, text, seed=0)
    for group in graph.prunable:
        torch.testing.assert_close(
            scores[group.name], torch.tensor(wanda(model, group, text.ids)), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("form", ["element", "vector"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt2", "mixtral"])
def test_taylor_is_the_reference(family: str, form: Any) -> None:
    model, text = TINY[family](), blocks()
    graph = trace(model)
    scores = Taylor(form=form).score(model, graph, text, seed=0)
    slow = taylor(model, graph, text.ids, form)
    assert_same(scores, Scores({name: torch.tensor(values) for name, values in slow.items()}))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt2", "mixtral"])
def test_fisher_is_the_reference(family: str, adapted: bool) -> None:
    model, text = TINY[family](), blocks()
    if adapted:
        model = with_lora(model)
    graph = trace(model)
    scores = Fisher().score(model, graph, text, seed=0)
    slow = fisher(model, graph, text.ids)
    assert_same(scores, Scores({name: torch.tensor(values) for name, values in slow.items()}))


def test_wanda_of_stacked_experts_averages_the_experts_by_their_tokens() -> None:
    model, text = TINY["mixtral"](), blocks()
    graph = trace(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    scores = WandaSP().score(model, graph, text, seed=0)["layers.0.mlp.experts"]
    hook.remove()
    whole = [(states, chosen) for states, chosen in seen if chosen.shape[:-1].numel() > 4]
    assert len(whole) < len(seen)  # without the four tokens on which the reader of the text was tried
    hidden, chosen = (
        torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in zip(*whole, strict=True)
    )
    expected = torch.zeros(40)
    for expert in range(experts.num_experts):
        mine = hidden[(chosen == expert).any(dim=1)]
        gate, up = (mine @ experts.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
        size = (nn.functional.silu(gate) * up).square().mean(0).sqrt()
        expected += experts.down_proj[expert].detach().abs().mean(0) * size * len(mine) / chosen.numel()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert model.config._experts_implementation == TINY["mixtral"]().config._experts_implementation


@pytest.mark.parametrize("criterion", [WandaSP, Taylor, LoRA])
def test_the_batch_size_does_not_change_scores(criterion: Callable[..., Any]) -> None:
    model = with_lora(TINY["llama-gqa"]())
    graph = trace(model)
    one, many = (criterion().score(model, graph, blocks(5, batch_size=size), 0) for size in (1, 5))
    assert_same(one, many)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_with_adapters_the_composed_weight_counts(criterion: str) -> None:
    """Scores of W + s B A are those of the merged model."""
    model = with_lora(TINY["llama-gqa"]())
    text = blocks()
    apart = CRITERIA[criterion]().score(model, trace(model), text, seed=0)
    merged = model.merge_and_unload()
    together = CRITERIA[criterion]().score(merged, trace(merged), text, seed=0)
    assert_same(apart, together)
    plain = CRITERIA[criterion]().score(TINY["llama-gqa"](), trace(TINY["llama-gqa"]()), text, seed=0)
    assert not torch.allclose(plain["layers.0.mlp"], apart["layers.0.mlp"], rtol=1e-3)


@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if not one.kinds])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_exactly_as_it_was(criterion: str, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(TINY["llama-gqa"]())
    graph = trace(model)
    model.train()
    model.get_submodule("base_model.model.model.norm").eval()
    some = next(p for n, p in model.named_parameters() if "lora_A" in n)
    some.grad = torch.ones_like(some)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    text = blocks()
    if broken:  # the second batch is out of the vocabulary
        text = Calibration(TokenBlocks(text.ids + torch.tensor([0] * 4 + [VOCAB] * 2)[:, None], text.blocks.sources))
        if CRITERIA[criterion].needs != "nothing" and "hesso-lora" not in criterion:  # which reads no text
            with pytest.raises(IndexError):
                CRITERIA[criterion]().score(model, graph, text, seed=0)
    else:
        CRITERIA[criterion]().score(model, graph, text, seed=0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [n for n, p in model.named_parameters() if p.grad is not None and p is not some] == []
    assert torch.equal(some.grad, torch.ones_like(some))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_scoring_happens_in_eval_mode() -> None:
    model = TINY["llama-gqa"]()
    dropped = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")).train()
    graph, text = trace(dropped), blocks()
    for criterion in (WandaSP(), Taylor(), LoRA()):
        assert_same(criterion.score(dropped, graph, text, 0), criterion.score(dropped, graph, text, 0))


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_taylor_ranks_units_like_the_loss_that_they_cost() -> None:
    model, text = TINY["llama-gqa"](), blocks(8, 32)
    graph = trace(model)
    scores = Taylor(form="vector").score(model, graph, text, seed=0)
    with torch.no_grad():
        loss = float(model(input_ids=text.ids, labels=text.ids).loss)
        for group in graph.prunable:
            if group.kind != "ffn":
                continue
            changes = []
            for unit in range(group.size):
                kept = {group.name: [other for other in range(group.size) if other != unit]}
                with masked(model, graph, kept):
                    changes.append(abs(float(model(input_ids=text.ids, labels=text.ids).loss) - loss))
            assert spearman(scores[group.name], torch.tensor(changes)) > 0.5


def test_random_scores_depend_on_the_seed_and_the_group_alone() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    fewer = replace(graph, groups=graph.groups[3:])
    scores = Random().score(model, graph, None, seed=1)
    assert_same(Random().score(model, fewer, None, seed=1), Scores({g.name: scores[g.name] for g in fewer.prunable}))
    assert not torch.equal(scores["layers.0.mlp"], scores["layers.1.mlp"])
    assert not torch.equal(scores["layers.0.mlp"], Random().score(model, graph, None, seed=2)["layers.0.mlp"])


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "lora"])
def test_text_is_asked_for(criterion: str) -> None:
    model = with_lora(TINY["llama-gqa"]())
    graph = trace(model)
    for nothing in (None, Calibration(TokenBlocks(torch.zeros(0, 8, dtype=torch.long), ()))):
        with pytest.raises(DataError, match=r"calibration\.text"):
            CRITERIA[criterion]().score(model, graph, nothing, seed=0)


def test_nothing_to_cut_is_nothing_to_score() -> None:
    model = with_lora(TINY["llama-gqa"]())
    graph = trace(model)
    protected = replace(graph, groups=tuple(replace(group, protected="a test") for group in graph))
    for criterion in CRITERIA.values():
        assert list(criterion().score(model, protected, blocks(), seed=0)) == []


def test_a_group_that_cannot_be_read_is_named() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    produced = [replace(g, members=tuple(m for m in g.members if m.role == "out")) for g in graph.groups]
    halved: DependencyGraph = replace(graph, groups=tuple(produced))
    for criterion in ("wanda", "fisher"):
        with pytest.raises(ModelError, match=r"layers\.0\.attention.*budget\.protect"):
            CRITERIA[criterion]().score(model, halved, blocks(), seed=0)

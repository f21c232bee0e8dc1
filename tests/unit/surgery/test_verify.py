"""``verify_cuts``: every group passes on a sound graph, and each way of being wrong is seen."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from secateur.export import standard_form
from secateur.graph import record, trace
from secateur.surgery import protect_failing, slice_model, verify_cuts
from secateur.surgery.verify import legal_units
from secateur.testing.contracts import with_adapters
from secateur.testing.tiny import TINY
from secateur.types import DependencyGraph, Member, NodeGroup

VERIFY, SLICE = (importlib.import_module(f"secateur.surgery.{name}") for name in ("verify", "slice"))
"""The modules; ``verify`` is also the name of the function."""


def with_group(graph: DependencyGraph, group: NodeGroup) -> DependencyGraph:
    return replace(graph, groups=tuple(group if old.name == group.name else old for old in graph))


def failing(monkeypatch: pytest.MonkeyPatch, model: nn.Module, wrong: DependencyGraph) -> dict[str, str]:
    """Names and messages of the failed checks when the tracer answers ``wrong``."""
    monkeypatch.setattr(VERIFY, "record", lambda seen: replace(record(seen), graph=wrong))
    return {check.group: check.message for check in verify_cuts(model) if not check.ok}


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3", "falcon-new", "olmo2"])
@pytest.mark.parametrize("lora", [False, True])
def test_sound_graphs_pass_and_the_model_is_untouched(family: str, lora: bool) -> None:
    model = with_adapters(TINY[family]()) if lora else TINY[family]()
    model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    checks = verify_cuts(model)
    assert [check.message for check in checks if not check.ok] == []
    assert [check.group for check in checks] == [*(g.name for g in trace(model).prunable), "all groups", "some groups"]
    assert all(check.max_difference <= 1e-4 < 1e-2 < check.effect for check in checks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    assert verify_cuts(model, seed=1) == verify_cuts(model, seed=1)
    assert verify_cuts(model, seed=1) != verify_cuts(model, seed=2)


def test_a_missing_member_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    group = graph["layers.0.mlp"]
    without_gate = tuple(member for member in group.members if "gate_proj" not in member.parameter)
    wrong = failing(monkeypatch, model, with_group(graph, replace(group, members=without_gate)))
    assert "layers.0.mlp" in wrong
    assert "layers.1.mlp" not in wrong


def test_a_misaligned_member_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-mha"]()
    graph = trace(model)
    group = graph["layers.1.attention"]

    def interleaved(member: Member) -> Member:
        if "v_proj" not in member.parameter:
            return member
        return replace(member, offsets=tuple(range(0, 48, 4)), stride=1, width=1)

    moved = tuple(interleaved(member) for member in group.members)
    wrong = failing(monkeypatch, model, with_group(graph, replace(group, members=moved)))
    assert "slicing differs from masking" in wrong["layers.1.attention"]


def test_a_stale_attribute_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SLICE, "attribute_changes", lambda *_: [])
    wrong = {check.group for check in verify_cuts(TINY["opt"]()) if not check.ok}
    assert {"layers.0.attention", "layers.1.attention", "all groups"} <= wrong
    assert "layers.0.mlp" not in wrong


def test_a_group_without_effect_is_seen() -> None:
    model = TINY["llama-gqa"]()
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    checks = {check.group: check for check in verify_cuts(model)}
    assert not checks["layers.0.mlp"].ok
    assert "no visible effect" in checks["layers.0.mlp"].message
    assert checks["layers.1.mlp"].ok


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("family", "layers"), [("gemma3", 2), ("deepseek-v3", 2), ("llama-one-layer", 1)])
def test_a_large_model_is_represented_by_a_stand_in(
    monkeypatch: pytest.MonkeyPatch, family: str, layers: int, lora: bool
) -> None:
    monkeypatch.setattr(VERIFY, "WHOLE_UP_TO", 1000)
    model = with_adapters(TINY[family]()) if lora else TINY[family]()
    checks = verify_cuts(model)
    assert [check for check in checks if not check.ok] == []
    assert all(f"on random weights and {layers} layers" in check.message for check in checks)


def test_a_model_without_weights_is_verified_by_a_stand_in() -> None:
    config = TINY["qwen3"]().config
    config.num_hidden_layers, config.layer_types = 7, ["full_attention"] * 7
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    checks = verify_cuts(model)
    assert all(check.ok and "2 layers" in check.message for check in checks)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama-gqa", "phi3"])
def test_uneven_layers_are_represented_by_a_stand_in(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    config = TINY[family]().config
    config.num_hidden_layers = 5
    model = AutoModelForCausalLM.from_config(config).eval()
    graph = trace(model)
    kept = {f"layers.{layer}.mlp": list(range(20 + 3 * layer)) for layer in range(5)} | {"layers.3.attention": [0]}
    slice_model(model, graph, kept)
    form = standard_form(model, graph, kept)
    uneven = form.model_class(form.config).eval()
    monkeypatch.setattr(VERIFY, "WHOLE_UP_TO", 1000)
    graph = trace(uneven)
    assert len({group.size for group in graph if group.kind == "ffn"}) == 5
    assert protect_failing(uneven, graph) == graph
    # the fourth is the first of its kind: one KV head
    assert all(check.ok and "4 layers" in check.message for check in verify_cuts(uneven))


def test_nothing_more_is_protected_in_a_sound_model() -> None:
    model = TINY["qwen3-moe"]()
    graph = trace(model)
    assert protect_failing(model, graph) == graph


def test_what_fails_a_check_is_protected_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY["opt"]().config
    config.num_hidden_layers = 5
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(SLICE, "attribute_changes", lambda *_: [])  # as if nothing were known about OPT's attention
    graph = trace(model)
    safe = protect_failing(model, graph)
    assert [group.name for group in safe.prunable] == [f"layers.{layer}.mlp" for layer in range(5)]
    assert "cutting it failed a check: " in str(safe["layers.4.attention"].protected)
    assert safe.fingerprint == graph.fingerprint


class _ScaledByAllHeads(nn.Module):
    """Attention that divides by the root of what all heads have together: right for the whole, wrong after a cut."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        wide = [linear(hidden_states) for linear in (self.q, self.k, self.v)]
        scale = wide[0].shape[-1] ** -0.5
        q, k, v = (states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in wide)
        states = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.o(states.transpose(1, 2).flatten(-2)), None


class _Scaled(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = _ScaledByAllHeads(config)  # type: ignore[assignment]
        self.post_init()


@pytest.mark.parametrize("initial", [0.02, 0.002])
def test_small_weights_of_a_config_hide_no_mistake(initial: float) -> None:
    config = TINY["llama-mha"]().config
    config.initializer_range = initial
    model = _Scaled(config).eval()
    graph = protect_failing(model, trace(model))
    assert "slicing differs from masking" in str(graph["layers.0.attention"].protected)
    assert graph["layers.0.mlp"].protected is None


def test_a_check_never_keeps_the_leading_units_alone() -> None:
    """Reformer draws rotations head by head: cutting the last heads alone leaves those of the others as they were."""
    group = NodeGroup("layers.0.attention", "attention", 4, ())
    for seed in range(40):
        torch.manual_seed(seed)
        for stay in (1, 2, 3):
            units = legal_units(group, stay)
            assert len(units) == stay
            assert units != list(range(stay))

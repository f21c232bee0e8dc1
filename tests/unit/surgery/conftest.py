"""Graphs written by hand, so that mask and slice are tested without the tracer."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from secateur.testing.tiny import TINY, randomise
from secateur.types import DependencyGraph, Member, NodeGroup


def member(name: str, axis: int, role: str, width: int = 1, offsets: tuple[int, ...] = (0,)) -> Member:
    return Member(name, axis, role, offsets, width, width)  # type: ignore[arg-type]


def linear(model: nn.Module, path: str, side: str, width: int = 1, offsets: tuple[int, ...] = (0,)) -> list[Member]:
    """Members of one side (``out`` or ``in``) of a linear or Conv1D, wrapped in adapters or not."""
    names = dict(model.named_parameters())
    weight = f"{path}.base_layer.weight" if f"{path}.base_layer.weight" in names else f"{path}.weight"
    stored_in_out = type(model.get_submodule(weight.rpartition(".")[0])).__name__ == "Conv1D"
    members = [member(weight, int((side == "in") != stored_in_out), side, width, offsets)]
    if side == "out" and weight.replace("weight", "bias") in names:
        members.append(member(weight.replace("weight", "bias"), 0, side, width, offsets))
    adapter = f"{path}.lora_{'A' if side == 'in' else 'B'}.default.weight"
    if adapter in names:
        members.append(member(adapter, int(side == "in"), side, width, offsets))
    return members


def graph_of(model: nn.Module, model_type: str, groups: list[NodeGroup]) -> DependencyGraph:
    return DependencyGraph(model_type, tuple(groups), {name: tuple(p.shape) for name, p in model.named_parameters()})


def llama_graph(model: nn.Module) -> DependencyGraph:
    prefix = "base_model.model.model.layers" if isinstance(model, PeftModel) else "model.layers"
    config, groups = model.config, []
    dim, kv, ffn = config.head_dim, config.num_key_value_heads, config.intermediate_size
    queries = config.num_attention_heads // kv * dim
    for index in range(config.num_hidden_layers):
        attention, mlp = f"{prefix}.{index}.self_attn", f"{prefix}.{index}.mlp"
        heads = [
            *linear(model, f"{attention}.q_proj", "out", queries),
            *linear(model, f"{attention}.o_proj", "in", queries),
        ]
        if kv > 1:
            heads += linear(model, f"{attention}.k_proj", "out", dim) + linear(model, f"{attention}.v_proj", "out", dim)
        else:
            heads = [Member(m.parameter, m.axis, m.role, m.offsets, dim, dim) for m in heads]
        groups.append(
            NodeGroup(
                f"layers.{index}.attention", "attention", kv if kv > 1 else queries // dim, tuple(heads), None, index
            )
        )
        channels = linear(model, f"{mlp}.gate_proj", "out") + linear(model, f"{mlp}.up_proj", "out")
        channels += linear(model, f"{mlp}.down_proj", "in")
        groups.append(NodeGroup(f"layers.{index}.mlp", "ffn", ffn, tuple(channels), None, index))
    hidden = (member(f"{prefix.rpartition('.')[0]}.embed_tokens.weight", 1, "out"),)
    groups.append(NodeGroup("hidden", "hidden", config.hidden_size, hidden, "residual width"))
    return graph_of(model, "llama", groups)


def gpt2_graph(model: nn.Module) -> DependencyGraph:
    prefix = "base_model.model.transformer.h" if isinstance(model, PeftModel) else "transformer.h"
    hidden, heads, groups = model.config.n_embd, model.config.n_head, []
    dim = hidden // heads
    for index in range(model.config.n_layer):
        block = f"{prefix}.{index}"
        attention = linear(model, f"{block}.attn.c_attn", "out", dim, (0, hidden, 2 * hidden))
        attention += linear(model, f"{block}.attn.c_proj", "in", dim)
        groups.append(NodeGroup(f"layers.{index}.attention", "attention", heads, tuple(attention), None, index))
        channels = linear(model, f"{block}.mlp.c_fc", "out") + linear(model, f"{block}.mlp.c_proj", "in")
        groups.append(NodeGroup(f"layers.{index}.mlp", "ffn", model.config.n_inner, tuple(channels), None, index))
    return graph_of(model, "gpt2", groups)


def with_lora(model: PreTrainedModel) -> PeftModel:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(adapted, seed=1)
    return adapted.eval()


CASES = {
    "llama-gqa": llama_graph,
    "llama-mha": llama_graph,
    "llama-mqa": llama_graph,
    "llama-tied": llama_graph,
    "llama-bias": llama_graph,
    "llama-odd": llama_graph,
    "gpt2": gpt2_graph,
}


@pytest.fixture(params=[(name, lora) for name in CASES for lora in (False, True)], ids=lambda p: f"{p[0]}-lora{p[1]:d}")
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, DependencyGraph]:
    """A tiny model, plain and with adapters on every linear, and its graph."""
    name, lora = request.param
    model = with_lora(TINY[name]()) if lora else TINY[name]()
    return model, CASES[name](model)


@pytest.fixture
def llama() -> tuple[nn.Module, DependencyGraph]:
    model = TINY["llama-gqa"]()
    return model, llama_graph(model)

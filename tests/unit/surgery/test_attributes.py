"""The table of attributes: what each means, on the families that read it in their forward."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.surgery import slice_model
from secateur.surgery.attributes import PATTERNS, attribute_changes
from secateur.testing.tiny import TINY
from secateur.types import DependencyGraph, Member, NodeGroup

EXPECTED = {
    # family, units of layers.0.attention kept: attribute → (before, after)
    ("llama-gqa", 1): {"num_key_value_groups": (2, 2)},
    ("llama-mqa", 3): {"num_key_value_groups": (4, 3)},
    ("gpt2", 3): {"num_heads": (4, 3), "split_size": (48, 36)},
    ("opt", 3): {"num_heads": (4, 3)},
    ("falcon-new", 1): {"num_heads": (4, 2), "num_kv_heads": (2, 1)},
    ("falcon-mqa", 3): {"num_heads": (4, 3), "num_kv_heads": (1, 1)},
    ("phi3", 1): {"num_key_value_heads": (2, 1), "num_key_value_groups": (2, 2), "config.num_attention_heads": (4, 2)},
    ("stablelm", 1): {"num_heads": (4, 2), "num_key_value_heads": (2, 1)},
    ("gpt-bigcode", 3): {"num_heads": (4, 3), "embed_dim": (48, 36)},
    ("gptj", 3): {"num_attention_heads": (4, 3)},
}


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """The attention module of a layer: the one that knows its place in the cache."""
    found = [module for module in model.modules() if vars(module).get("layer_idx") == layer]
    return next(module for module in found if "Attention" in type(module).__name__)


def value(module: nn.Module, name: str) -> int:
    holder = module.config if name.startswith("config.") else module
    return int(getattr(holder, name.removeprefix("config.")))


@pytest.mark.parametrize(("family", "units"), EXPECTED)
def test_attributes_follow_their_axis_in_the_layer_that_was_cut(family: str, units: int) -> None:
    model = TINY[family]()
    graph, attributes = trace(model), EXPECTED[family, units]
    cut, whole = attention_of(model, 0), attention_of(model, 1)
    before = {name: value(cut, name) for name in attributes}
    slice_model(model, graph, {"layers.0.attention": list(range(units))})
    assert before == {name: old for name, (old, _) in attributes.items()}
    assert {name: value(cut, name) for name in attributes} == {name: new for name, (_, new) in attributes.items()}
    assert {name: value(whole, name) for name in attributes} == before  # also what layers share: the config
    assert model.config.num_attention_heads == 4


def test_widths_of_experts_follow() -> None:
    model = TINY["mixtral"]()
    slice_model(model, trace(model), {"layers.0.mlp.experts": list(range(24))})
    experts = model.model.layers[0].mlp.experts
    assert experts.intermediate_dim == 24
    assert experts.config._experts_implementation == model.config._experts_implementation
    assert model.model.layers[1].mlp.experts.intermediate_dim == 40


def test_experts_of_a_width_that_grouped_kernels_refuse_take_others() -> None:
    model = TINY["mixtral"]()
    implementation = model.config._experts_implementation
    slice_model(model, trace(model), {"layers.0.mlp.experts": list(range(13))})
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "eager"
    assert model.config._experts_implementation == implementation
    assert model.model.layers[1].mlp.experts.config is model.config
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_an_attribute_that_does_not_follow_is_refused() -> None:
    model = TINY["gptj"]()
    attention_of(model, 0).num_attention_heads = 7
    graph = trace(AutoModelForCausalLM.from_config(model.config))
    with pytest.raises(ModelError, match=r"num_attention_heads is 7, which does not follow the 4 units"):
        attribute_changes(model, graph, {"layers.0.attention": [0]})


def test_only_modules_between_a_group_and_its_home_are_touched() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.num_heads = nn.Linear(4, 6), nn.Linear(6, 4), 6

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.num_heads = Block(), 6

    model = Model()
    members = (Member("block.up.weight", 0, "out", (0,), 1, 1), Member("block.down.weight", 1, "in", (0,), 1, 1))
    graph = DependencyGraph("blocks", (NodeGroup("layers.0.attention", "attention", 6, members),), {})
    changes = attribute_changes(model, graph, {"layers.0.attention": [0, 1]})
    assert [(change.module, change.name, change.value) for change in changes] == [(model.block, "num_heads", 2)]


def test_the_table_is_small_and_its_class_names_are_patterns() -> None:
    assert len(PATTERNS) <= 40
    assert len({(p.kind, p.name, p.in_config, p.encloses) for p in PATTERNS}) == len(PATTERNS)
    assert all(re.compile(pattern.classes) for pattern in PATTERNS)

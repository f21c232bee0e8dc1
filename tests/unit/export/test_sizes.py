"""Which config attribute holds a group's size, and what the sizes of layers become."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from secateur.errors import ModelError
from secateur.export.layers import LayerSizes
from secateur.export.runtimes import runtimes_of
from secateur.export.sizes import query_heads_name, size_name, size_place_of
from secateur.graph import trace
from secateur.testing.tiny import TINY
from secateur.types import Kind, Member, NodeGroup


def group(kind: Kind, size: int, parameter: str = "model.layers.1.mlp.up_proj.weight") -> NodeGroup:
    return NodeGroup("layers.1.it", kind, size, (Member(parameter, 0, "out", (0,), 1, 1),), layer=1)


@pytest.mark.parametrize(
    ("model_type", "options", "found", "name"),
    [
        ("llama", {"intermediate_size": 40}, group("ffn", 40), "intermediate_size"),
        ("llama", {"num_key_value_heads": 2}, group("attention", 2), "num_key_value_heads"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, group("attention", 4), "num_attention_heads"),
        ("gpt2", {"n_inner": None}, group("ffn", 192), "n_inner"),
        ("gpt2", {"n_head": 4}, group("attention", 4), "n_head"),
        ("opt", {"ffn_dim": 40}, group("ffn", 40), "ffn_dim"),
        ("falcon", {"ffn_hidden_size": 40}, group("ffn", 40), "ffn_hidden_size"),
        ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, group("attention", 2), "num_kv_heads"),
        ("bloom", {}, group("ffn", 192), "pruned_ffn_units"),
        ("mixtral", {"num_local_experts": 4}, group("expert", 4), "num_local_experts"),
        ("llama", {"vocab_size": 97}, group("vocab", 97), "vocab_size"),
    ],
)
def test_names_are_found_by_value(model_type: str, options: dict[str, Any], found: NodeGroup, name: str) -> None:
    assert size_name(AutoConfig.for_model(model_type, **options), found) == name


def test_the_path_decides_between_names_of_the_same_value() -> None:
    config = AutoConfig.for_model("qwen3_moe", intermediate_size=20, moe_intermediate_size=20)
    experts = group("ffn", 20, "model.layers.1.mlp.experts.down_proj")
    assert size_name(config, experts) == "moe_intermediate_size"
    assert size_name(config, group("ffn", 20)) == "intermediate_size"


def test_query_heads_are_named_beside_kv_heads() -> None:
    config = AutoConfig.for_model("llama")
    assert query_heads_name(config, "num_key_value_heads") == "num_attention_heads"
    assert query_heads_name(config, "num_attention_heads") is None


def test_members_on_one_axis_are_added_up() -> None:
    graph = trace(TINY["phi3"]())
    place = size_place_of(graph["layers.1.attention"])
    assert place is not None
    assert place.path == "model.layers"
    assert dict(place.rows) == {"self_attn.qkv_proj.weight:0": 24 + 12 + 12, "self_attn.o_proj.weight:1": 24}
    assert place == size_place_of(graph["layers.0.attention"])


def test_layers_of_one_size_make_a_plain_config() -> None:
    model = TINY["mistral"]()
    graph = trace(model)
    kept = {f"layers.{layer}.{part}": [0] for layer in (0, 1) for part in ("mlp", "attention")}
    config = LayerSizes(model.config, graph, kept).even()
    assert config is not None
    sizes = (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads, config.head_dim)
    assert sizes == (1, 1, 2, 12)
    assert model.config.intermediate_size == 40, "the model's own config stays"
    assert LayerSizes(model.config, graph, {"layers.0.mlp": [0]}).even() is None


def test_groups_that_no_config_can_describe_are_refused() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    shared = NodeGroup("hidden.odd", "state", 7, (Member("model.norm.weight", 0, "out", (0,), 1, 1),))
    across = NodeGroup("layers.0.odd", "ffn", 7, (Member("model.norm.weight", 0, "out", (0,), 1, 1),), layer=0)
    for odd in (shared, across):
        other = type(graph)(graph.model_type, (*graph.groups, odd), graph.shapes)
        with pytest.raises(ModelError, match="Protect"):
            LayerSizes(model.config, other, {odd.name: [0]})


def test_runtimes_are_judged_by_the_shapes() -> None:
    plain = {"model_type": "qwen2", "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 256}
    verdicts = {verdict.runtime: verdict.opens for verdict in runtimes_of(plain)}
    assert verdicts == {"transformers": "yes", "vLLM": "likely", "llama.cpp": "likely", "ONNX Runtime": "likely"}
    fewer_heads = {**plain, "num_attention_heads": 2, "head_dim": 12}
    verdicts = {verdict.runtime: verdict.opens for verdict in runtimes_of(fewer_heads)}
    assert verdicts == {"transformers": "yes", "vLLM": "no", "llama.cpp": "no", "ONNX Runtime": "unknown"}
    for family, expected in (("phi3", ("likely", "no")), ("qwen3", ("likely", "likely")), ("olmo", ("unknown",) * 2)):
        of_family = {v.runtime: v.opens for v in runtimes_of({**fewer_heads, "model_type": family})}
        assert (of_family["vLLM"], of_family["llama.cpp"]) == expected
    uneven = {verdict.runtime: verdict for verdict in runtimes_of({**plain, "pruned_layers": {}})}
    assert uneven["llama.cpp"].opens == "no"
    assert [name for name, verdict in uneven.items() if verdict.basis == "run here"] == ["transformers"]

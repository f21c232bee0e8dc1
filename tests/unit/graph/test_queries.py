"""Query heads within their KV heads: where they are found, which rows are theirs, and what a plan may do with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.errors import PlanError
from secateur.graph import record, replay, trace
from secateur.graph.queries import of_pairs, within_heads
from secateur.surgery.verify import legal_units
from secateur.testing.contracts import with_adapters
from secateur.testing.tiny import TINY, build
from secateur.types import DependencyGraph, Member

GROUPED = ("llama-gqa", "llama-odd", "qwen3", "gemma3", "phi3", "olmo2", "falcon-new", "gpt-oss", "stablelm", "mixtral")


def queries(graph: DependencyGraph) -> list[str]:
    return [group.name for group in graph if group.kind == "query"]


@pytest.mark.parametrize("name", GROUPED)
def test_every_layer_has_them_beside_its_kv_heads(name: str) -> None:
    model = TINY[name]()
    config, graph = model.config, trace(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_kv_heads
    assert queries(graph) == [f"layers.{layer}.attention.query" for layer in range(config.num_hidden_layers)]
    for group in graph:
        if group.kind == "query":
            assert (group.size, group.runs, group.least, group.within) == (
                heads,
                kv_heads,
                kv_heads,
                f"layers.{group.layer}.attention",
            )
            assert group.on_request
            assert group.protected == "protected by default: query"
            assert group.within is not None
            assert graph[group.within].size == kv_heads


@pytest.mark.parametrize("name", ["llama-mha", "llama-mqa", "phi", "gpt2", "falcon-mqa", "deepseek-v3", "bloom"])
def test_there_are_none_where_a_kv_head_has_one_or_where_there_is_one_kv_head(name: str) -> None:
    assert queries(trace(TINY[name]())) == []


@pytest.mark.parametrize("name", GROUPED)
def test_a_kv_head_owns_the_rows_of_its_query_heads_and_each_row_has_one_owner(name: str) -> None:
    graph = trace(TINY[name]())
    query = graph["layers.0.attention.query"]
    assert query.within is not None
    heads = graph[query.within]
    length = query.size // query.runs
    for member in query.members:
        rows = member.rows(range(query.size))
        assert rows.unique().numel() == rows.numel()
        around = {
            unit: {
                row
                for other in heads.members
                if (other.parameter, other.axis) == (member.parameter, member.axis)
                for row in other.rows([unit]).flatten().tolist()
            }
            for unit in range(heads.size)
        }
        for unit in range(query.size):
            assert set(rows[unit].tolist()) <= around[unit // length]


def test_rows_of_a_fused_projection_with_the_key_and_the_value_in_between() -> None:
    graph = trace(TINY["falcon-new"]())
    members = {member.parameter.split(".")[-2]: member for member in graph["layers.0.attention.query"].members}
    fused = members["query_key_value"]  # 2 x (2 query heads, key, value) x 12
    assert (fused.offsets, fused.stride, fused.width, fused.run, fused.gap) == ((0,), 12, 12, 2, 24)
    assert fused.rows([0, 1, 2, 3])[:, 0].tolist() == [0, 12, 48, 60]
    assert members["dense"].rows([0, 1, 2, 3])[:, 0].tolist() == [0, 12, 24, 36]


def test_adapters_change_nothing_but_add_their_rows() -> None:
    plain, adapted = TINY["phi3"](), with_adapters(TINY["phi3"]())
    graphs = trace(plain), trace(adapted)
    assert queries(graphs[0]) == queries(graphs[1])
    assert graphs[0].fingerprint == graphs[1].fingerprint
    assert sum(".lora_" in member.parameter for member in graphs[1]["layers.1.attention.query"].members) == 2


def test_plans_from_before_there_were_query_heads_still_fit() -> None:
    graph = trace(TINY["llama-gqa"]())
    without = replace(graph, groups=tuple(group for group in graph if group.kind != "query"))
    assert graph.fingerprint == without.fingerprint


def test_what_speaks_against_cutting_kv_heads_speaks_against_cutting_query_heads() -> None:
    model = build("llama-gqa")
    attention = type(model.model.layers[0].self_attn)

    class Numbered(attention):  # type: ignore[misc, valid-type]
        """Scales every KV head's queries by its number."""

        def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
            scales = torch.arange(2.0, device=hidden_states.device).repeat_interleave(24) + 1
            return super().forward(hidden_states * 1, *args, **kwargs)[0] * scales, None

    model.model.layers[0].self_attn.o_proj = torch.nn.Identity()
    model.model.layers[0].self_attn.__class__ = Numbered
    graph = trace(model)
    first = [group for group in graph if group.layer == 0 and group.kind in ("attention", "query")]
    assert all(group.protected and not group.on_request for group in first)
    assert graph["layers.1.attention.query"].on_request


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", GROUPED)
def test_the_replayed_operators_compute_the_same_whichever_heads_go(name: str, lora: bool) -> None:
    model = with_adapters(TINY[name]()) if lora else TINY[name]()
    run = record(model)
    torch.manual_seed(0)
    kept = {group: legal_units(run.graph[group], run.graph[group].runs) for group in queries(run.graph)}
    kept["layers.0.attention.query"] = [  # another one of each KV head
        head * run.graph["layers.0.attention.query"].size // run.graph["layers.0.attention.query"].runs + head % 2
        for head in range(run.graph["layers.0.attention.query"].runs)
    ]
    replayed = replay(model, run, kept)
    assert replayed.difference < 1e-4
    assert replayed.effect > 1e-2


def test_every_kv_head_keeps_equally_many() -> None:
    graph = trace(TINY["llama-odd"]())
    name = "layers.1.attention.query"
    graph.check_kept({name: [0, 1, 4, 5, 6, 8]})
    for wrong in ([0, 1, 2, 3, 6], [0, 1, 3]):
        with pytest.raises(PlanError, match="equally many"):
            graph.check_kept({name: wrong})


def test_a_plan_cuts_kv_heads_or_query_heads() -> None:
    graph = trace(TINY["llama-gqa"]())
    both = {"layers.0.attention": [1], "layers.0.attention.query": [0, 2]}
    with pytest.raises(PlanError, match=r"cuts layers\.0\.attention and layers\.0\.attention\.query"):
        graph.check_kept(both)
    graph.check_kept({**both, "layers.0.attention": [0, 1]})  # which keeps all of them
    graph.check_kept({"layers.1.attention": [1], "layers.0.attention.query": [0, 2]})


def test_pairs_need_the_same_distance_everywhere() -> None:
    def member(*offsets: int, width: int = 3) -> Member:
        return Member("q", 0, "out", offsets, width, width)

    assert of_pairs(member(0, 6), 2, 2) == Member("q", 0, "out", (0,), 3, 3, 2, 0)
    assert of_pairs(member(5, 17, 40, 52), 2, 2) == Member("q", 0, "out", (5, 40), 3, 3, 2, 6)
    assert of_pairs(member(0, 6, 13), 3, 2) is None
    assert of_pairs(member(0, 3), 2, 2) is None, "they would overlap"
    inside, outside = Member("q", 0, "out", (0,), 12, 12), Member("q", 0, "out", (0,), 15, 15)
    assert within_heads([member(0, 12)], [inside], 2, 2) == [Member("q", 0, "out", (0,), 3, 3, 2, 6)]
    assert within_heads([member(0, 12)], [outside], 2, 2) is None
    assert within_heads([member(0, 12)], [replace(inside, axis=1)], 2, 2) is None

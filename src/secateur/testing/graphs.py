"""Dependency graphs built by hand, from shapes alone: independent of the tracer, and of any model."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.planning.shapes import legal_counts
from secateur.types import DependencyGraph, Member, NodeGroup


def allowed_miss(graph: DependencyGraph) -> int:
    """Parameters that an allocation may miss its target by: one unit of the cheapest kind.

    Where widths go in steps (stacked experts), one step of those: between two of them nothing may be left to take.
    """
    costs = {group.name: graph.unit_cost(group) for group in graph.prunable}
    steps = []
    for group in graph.prunable:
        counts = legal_counts(group, graph, "transformers", {})
        if len(counts) > 1 and counts[-1] - counts[-2] > 1:
            steps.append(costs[group.name] * (counts[-1] - counts[-2]))
    return max(steps) if steps else min(costs.values())


def llama_graph(
    ffn: Sequence[int],
    kv_heads: Sequence[int],
    *,
    queries: int = 2,
    head_dim: int = 12,
    hidden: int = 48,
    vocabulary: int = 97,
    tied: bool = False,
    model_type: str = "llama",
) -> DependencyGraph:
    """The graph of a Llama whose i-th layer has ``ffn[i]`` channels and ``kv_heads[i]`` KV heads.

    ``queries`` is the number of query heads of a KV head. The defaults fit ``secateur.testing.tiny``'s ``llama-gqa``.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    groups: list[NodeGroup] = []
    for index, (width, heads) in enumerate(zip(ffn, kv_heads, strict=True)):
        layer = f"model.layers.{index}"
        q, k, v, o = (f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        wide = queries * head_dim
        shapes |= {q: (heads * wide, hidden), k: (heads * head_dim, hidden), v: (heads * head_dim, hidden)}
        shapes |= {o: (hidden, heads * wide), gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        attention = (
            _member(q, 0, wide),
            _member(k, 0, head_dim),
            _member(v, 0, head_dim),
            _member(o, 1, wide),
        )
        channels = (_member(gate, 0, 1), _member(up, 0, 1), _member(down, 1, 1))
        groups.append(NodeGroup(f"layers.{index}.attention", "attention", heads, attention, layer=index))
        groups.append(NodeGroup(f"layers.{index}.mlp", "ffn", width, channels, layer=index))
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return DependencyGraph(model_type, tuple(groups), shapes)


def _member(parameter: str, axis: int, width: int) -> Member:
    return Member(parameter, axis, "in" if axis == 1 else "out", (0,), width, width)

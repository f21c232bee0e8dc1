"""Names of the sizes of node groups in the config of a family, and the places of the groups in a layer.

Names are found by a table and a check of the value, not for each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from secateur.surgery.rebuild import OWN_NAME
from secateur.types import Kind, NodeGroup

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "ffn": (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "ffn_dim",
        "n_inner",
        "ffn_hidden_size",
        "intermediate_dim",
        "d_ff",
    ),
    "attention": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_attention_heads", "num_heads"),
    "query": ("num_attention_heads", "num_heads"),
    "expert": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "hidden": ("hidden_size", "d_model"),
    "vocab": ("vocab_size",),
}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")


def size_name(config: PreTrainedConfig, group: NodeGroup) -> str:
    """The attribute of ``config`` with the number of units of ``group``; ``config`` describes its layer.

    Among attributes with this number, one whose marked words (expert, shared) are in the paths of the group's
    parameters is preferred. When no name fits (bloom computes the size from others), it is one of our names.
    """
    names = [config.attribute_map.get(name, name) for name in _NAMES.get(group.kind, ())]
    names = [name for name in names if hasattr(config, name)]
    path = " ".join(member.parameter for member in group.members)
    fitting = [name for name in names if getattr(config, name) == group.size]
    fitting.sort(key=lambda name: _disagreement(name, path))
    unset = [name for name in names if getattr(config, name) is None]
    return (fitting + unset + [f"{OWN_NAME}{group.kind}_units"])[0]


def query_heads_name(config: PreTrainedConfig, name: str) -> str | None:
    """The attribute with the number of query heads, if ``name`` is another one (of KV heads, or ours); else None."""
    query = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    apart = name in _KV_HEADS or name.startswith(f"{OWN_NAME}attention")
    return query if apart and hasattr(config, query) else None


def _disagreement(name: str, path: str) -> int:
    marked = name.replace("moe", "expert")
    return sum((word in marked) != (word in path) for word in ("expert", "shared"))


@dataclass(frozen=True)
class SizePlace:
    """The place of a group in its layer; the same in all layers of the same structure."""

    path: str
    """Path of the list of layers, such as ``model.layers``."""
    rows: frozenset[tuple[str, int]]
    """``"path inside the layer:axis"`` of each member, with the rows of one unit."""
    runs: int = 1
    """For units within those of another group: query heads are removed from this many KV heads in step, and the number
    of query heads of a KV head falls by one for that many."""


def size_place_of(group: NodeGroup) -> SizePlace | None:
    """The place of ``group``; None for a group that is not inside one layer."""
    path, marker, _ = group.members[0].parameter.partition(f".{group.layer}.")
    prefix = path + marker
    if not marker or not all(member.parameter.startswith(prefix) for member in group.members):
        return None
    rows: dict[str, int] = {}
    for member in group.members:
        key = f"{member.parameter.removeprefix(prefix)}:{member.axis}"
        rows[key] = rows.get(key, 0) + member.rows_per_unit  # several members on one axis: fused projections
    return SizePlace(path, frozenset(rows.items()), group.runs if group.within is not None else 1)

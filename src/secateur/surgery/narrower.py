"""Makes a config with smaller widths and no other change: checks then cost only seconds and megabytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from secateur.surgery.rebuild import OWN_NAME, is_uneven

_HIDDEN = ("hidden_size", "d_model", "n_embd")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_TOGETHER = (*_HIDDEN, *_HEADS, *_KV_HEADS)
"""Sizes that are divided by the same number, which keeps the width of a head and the queries of a KV head."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_AT_MOST = {
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "intermediate_size_mlp"), 416),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 208),
    **dict.fromkeys(_EXPERTS, 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 2),
}
"""Sizes that a narrow stand-in needs no more of."""


def narrower(config: PretrainedConfig) -> PretrainedConfig:
    """``config``, changed in place, with smaller widths: all of ``_TOGETHER`` by one power of two.

    Where layers have sizes of their own, by design or from an earlier round of pruning, these become smaller in step.
    Heads are left when a round has left layers with different numbers of them, and the width of a head is written.
    """
    text = config.get_text_config()
    layers = text.to_dict().get("per_layer_config", {})
    text.per_layer_config = None  # no size can be read while layers differ in it
    before = {name: size for name in vars(text) if (size := _size(text, name))}
    names = [name for name in _TOGETHER if name in before]
    uneven = is_uneven(text)
    counts_heads = any(_stands_for(name, before) in (*_HEADS, *_KV_HEADS) for own in layers.values() for name in own)
    if not (uneven and counts_heads and "head_dim" in before):
        by_design = () if uneven else layers.values()
        divisor = _divisor([{name: own.get(name, before[name]) for name in names} for own in ({}, *by_design)])
        for name in names:
            setattr(text, name, before[name] // divisor)
    if _size(text, "head_dim"):  # then the hidden size is free to go on alone, as long as validators see it divide
        hidden, heads = (next((name for name in group if name in before), "") for group in (_HIDDEN, _HEADS))
        while hidden and heads and _size(text, hidden) > 512 and _size(text, hidden) % (2 * _size(text, heads)) == 0:
            setattr(text, hidden, _size(text, hidden) // 2)
    for name, most in _AT_MOST.items():
        if name in before:
            setattr(text, name, min(before[name], most))
    if layers:
        _narrow_layers(text, layers, before)
    return config


def _size(config: PretrainedConfig, name: str) -> int:
    """The size called ``name``, or 0; names that stand for another are left to that one."""
    value = getattr(config, name, None) if name not in config.attribute_map else None
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _divisor(layers: Sequence[Mapping[str, int]]) -> int:
    """The largest power of two that divides all sizes of all ``layers`` and leaves two KV heads, or two of each."""
    few = [name for name in layers[0] if name in _KV_HEADS] or list(layers[0])
    divisor = 1
    while few and all(
        size % (2 * divisor) == 0 and (name not in few or size // (2 * divisor) >= 2)
        for sizes in layers
        for name, size in sizes.items()
    ):
        divisor *= 2
    return divisor


def _narrow_layers(text: PretrainedConfig, layers: Mapping[str, Mapping[str, Any]], before: Mapping[str, int]) -> None:
    """Make the sizes that ``layers`` have as much smaller as those of all layers have become since ``before``."""
    for name in [name for name in before if name.startswith(OWN_NAME)]:  # what counts is how much of it layers lack
        like = _stands_for(name, before)
        setattr(text, name, in_step(before[name], before[like], _size(text, like)))
    after = {name: _size(text, name) for name in before}
    text.per_layer_config = {
        layer: {
            name: in_step(size, before[name], after[name]) if name in before and isinstance(size, int) else size
            for name, size in own.items()
        }
        for layer, own in layers.items()
    }


def _stands_for(name: str, sizes: Mapping[str, int]) -> str:
    """The family's own size that ``name`` follows: itself, or of names that we gave, the one that they are like."""
    plain = name.removeprefix(OWN_NAME)
    if plain == name or plain in sizes:
        return plain
    kind = plain.partition("_")[0]
    names = {"attention": (*_KV_HEADS, *_HEADS), "query": _HEADS, "expert": _EXPERTS}.get(kind, _HIDDEN)
    return next((like for like in names if like in sizes), name)


def in_step(size: int, before: int, after: int) -> int:
    """``size`` scaled by ``after / before``: a smaller size remains smaller, and more than one remains more than one.

    >>> in_step(5000, 6144, 416), in_step(6144, 6144, 416), in_step(1, 8, 2), in_step(7, 8, 2)
    (338, 416, 1, 2)
    """
    if size == before or before == after:
        return after if size == before else size
    several = min(size, 2)
    smaller = max(several, size * after // before)
    return min(smaller, max(after - 1, several)) if size < before else smaller

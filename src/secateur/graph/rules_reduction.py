"""Operators that reduce an axis without a product, or normalise over it.

They are marked, because removing a unit and zeroing it are then not the same: the reduction has to see its neutral
element, and a divisor has to count the survivors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.graph.axes import Axis, leaf, mark, refuse, sever, split_axis, unify
from secateur.graph.rules_elementwise import Rule, elementwise
from secateur.graph.symbols import Call, SymbolTable


def _dims(call: Call, x: torch.Tensor) -> list[int]:
    """The dimensions asked for; all of them when none is."""
    names = {argument.name for argument in call.func._schema.arguments}
    asked = call["dim"] if "dim" in names else None
    if isinstance(asked, int):
        asked = [asked]
    return [dim % x.dim() for dim in asked] if asked and x.dim() else list(range(x.dim()))


def _reduced(call: Call, axes: Sequence[Axis], dims: Sequence[int], out: torch.Tensor) -> list[Axis]:
    if out.dim() == len(axes):  # keepdim
        return [() if dim in dims else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in dims]


def reduction(what: str) -> Rule:
    """A reduction that is called ``what`` in the marks of the axes it runs over."""

    def rule(table: SymbolTable, call: Call) -> None:
        x = call["self"]
        axes, dims = table[x].axes, _dims(call, x)
        table.index_arithmetic(call, (x,))
        for dim in dims:
            mark(axes[dim], what)
        for out in call.outputs:
            table.put(out, _reduced(call, axes, dims, out))

    return rule


def normalisation(what: str) -> Rule:
    """Softmax, cumulative sums: every result depends on the whole axis, which stays."""

    def rule(table: SymbolTable, call: Call) -> None:
        x = call["self"]
        axes = table[x].axes
        table.index_arithmetic(call, (x,))
        mark(axes[call["dim"]] if x.dim() else (), what)
        for out in call.outputs:
            table.put(out, axes)

    return rule


def extremum(table: SymbolTable, call: Call) -> None:
    """``max``, ``min`` along a dimension, with the indices of the winners."""
    x = call["self"]
    axes, dims = table[x].axes, _dims(call, x)
    domain = table[x].domain
    values, *indices = call.outputs
    for dim in dims:
        mark(axes[dim], "max")
        mark(axes[dim] if indices else (), "winner")
    table.put(values, _reduced(call, axes, dims, values), domain)
    for out in indices:
        table.put(out, _reduced(call, axes, dims, out), axes[dims[0]])


def argument_of_extremum(table: SymbolTable, call: Call) -> None:
    """``argmax``, ``argmin``: indices of the axis."""
    x = call["self"]
    if call["dim"] is None:
        raise NotImplementedError
    axes, dims = table[x].axes, _dims(call, x)
    mark(axes[dims[0]], "max")
    mark(axes[dims[0]], "winner")
    table.put(call.out, _reduced(call, axes, dims, call.out), axes[dims[0]])


def topk(table: SymbolTable, call: Call) -> None:
    """The k best, and their indices: the axis is what a router chooses from."""
    x = call["self"]
    axes = list(table[x].axes)
    dim = call["dim"] % x.dim()
    chosen_from = axes[dim]
    mark(chosen_from, "top-k")
    axes[dim] = leaf(call.outputs[0].shape[dim])
    refuse(axes[dim], "the number of chosen ones (top-k)")
    values, indices = call.outputs
    table.put(values, axes, table[x].domain)
    table.put(indices, axes, chosen_from)


def sort(table: SymbolTable, call: Call) -> None:
    """Sorted values lie along a new axis, whose units are in another order; the indices lead back to the old one."""
    x = call["self"]
    axes = list(table[x].axes)
    dim = call["dim"] % x.dim()
    before, after = axes[dim], leaf(x.shape[dim])
    sever(before + after, f"units are reordered ({call.name})")
    axes[dim] = after
    *values, indices = call.outputs
    for out in values:
        table.put(out, axes, table[x].domain)
    table.put(indices, axes, before)


def layer_norm(table: SymbolTable, call: Call) -> None:
    """Statistics over the last dimensions, then weight and bias along them."""
    x = call["input"]
    axes = table[x].axes
    kept = x.dim() - len(call["normalized_shape"])
    for axis in axes[kept:]:
        mark(axis, "layer norm")
    names = {argument.name for argument in call.func._schema.arguments}
    for name in sorted(names & {"weight", "bias"}):
        if call[name] is not None:
            for axis, other in zip(axes[kept:], table[call[name]].axes, strict=True):
                unify(axis, other)
    for out in call.outputs:
        same = out.shape == x.shape
        table.put(out, axes if same else (*axes[:kept], *([()] * (out.dim() - kept))))


def group_norm(table: SymbolTable, call: Call) -> None:
    """Channels are ``groups x within``; statistics run over what is within."""
    x, groups = call["input"], call["group"]
    axes = table[x].axes
    _, within = split_axis(axes[1], x.shape[1] // groups)
    mark(within, "group norm")
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(axes[1], table[call[name]].axes[0])
    outs = call.outputs
    table.put(outs[0], axes)
    for out in outs[1:]:
        table.put(out, [leaf(size) for size in out.shape])


RULES: dict[str, Rule] = {
    "aten.mean": reduction("mean"),
    "aten.sum": reduction("sum"),
    "aten.nansum": reduction("sum"),
    "aten.prod": reduction("product"),
    "aten.all": reduction("all"),
    "aten.any": reduction("any"),
    "aten.aminmax": reduction("max"),
    "aten.amax": reduction("max"),
    "aten.amin": reduction("max"),
    "aten.logsumexp": reduction("logsumexp"),
    "aten.var": reduction("variance"),
    "aten.std": reduction("variance"),
    "aten.var_mean": reduction("variance"),
    "aten.std_mean": reduction("variance"),
    "aten.linalg_vector_norm": reduction("vector norm"),
    "aten.norm": reduction("vector norm"),
    "aten._softmax": normalisation("softmax"),
    "aten._safe_softmax": normalisation("softmax"),
    "aten._log_softmax": normalisation("softmax"),
    "aten.softmax": normalisation("softmax"),
    "aten.cumsum": normalisation("cumulative sum"),
    "aten.cumsum_": normalisation("cumulative sum"),
    "aten.cumprod": normalisation("cumulative product"),
    "aten.logcumsumexp": normalisation("cumulative sum"),
    "aten.max.other": elementwise,
    "aten.min.other": elementwise,
    "aten.max": extremum,
    "aten.min": extremum,
    "aten.argmax": argument_of_extremum,
    "aten.argmin": argument_of_extremum,
    "aten.topk": topk,
    "aten.sort": sort,
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": layer_norm,
    "aten.native_group_norm": group_norm,
}

"""Operators that look things up: the values of an index tensor are units of the axis that is indexed.

This is what ties a router to its experts and a token to its embedding. An index whose meaning is not known could point
anywhere after a cut, so it protects the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from secateur.graph.axes import Axis, leaf, mark, refuse, sever, size_of, span, split_at, unify
from secateur.graph.rules_elementwise import Rule
from secateur.graph.symbols import Call, SymbolTable


def _look_up(table: SymbolTable, call: Call, axis: Axis, index: torch.Tensor) -> None:
    """The values of ``index`` are units of ``axis``."""
    domain = table[index].domain
    if index.dtype == torch.bool:
        refuse(axis, f"chosen by a mask ({call.name})")
    elif domain is None or size_of(domain) != size_of(axis):
        sever(axis, f"indexed by computed values ({call.name})")
        if domain is not None:
            refuse(domain, f"values index something of another size ({call.name})")
    else:
        unify(domain, axis)
        mark(axis, "looked up")


def embedding(table: SymbolTable, call: Call) -> None:
    """Rows of a table: the result is an activation, so the features are no longer seen as the parameter's."""
    weight, indices = call["weight"], call["indices"]
    axes = table[weight].axes
    _look_up(table, call, axes[0], indices)
    table.put(call.out, (*table[indices].axes, axes[1]), table[weight].domain)


def index(table: SymbolTable, call: Call) -> None:
    """``x[..., i, j]`` with index tensors: the indexed dimensions give way to those of the indices, broadcast."""
    x, indices = call["self"], list(call["indices"])
    axes, places = table[x].axes, [place for place, item in enumerate(indices) if item is not None]
    chosen = [indices[place] for place in places]
    symbol = table[x]
    constant = _constant_run(table, x, chosen, places)
    if constant is not None:
        new: Sequence[Axis] = [constant]
    elif any(item.dtype == torch.bool for item in chosen):
        _index_by_mask(table, call, chosen, places)
        return
    else:
        for place, item in zip(places, chosen, strict=True):
            _look_up(table, call, axes[place], item)
        new = table.broadcast(chosen)
    dims: list[int | None] = [dim for dim in range(x.dim()) if dim not in places]
    kept = [axes[dim] for dim in range(x.dim()) if dim not in places]
    together = all(after == before + 1 for before, after in pairwise(places))
    at = places[0] if together else 0
    dims[at:at] = [None] * len(new)
    origins = (origin.through(dims) for origin in symbol.origins)
    table.put(call.out, (*kept[:at], *new, *kept[at:]), symbol.domain, origins)


def _constant_run(
    table: SymbolTable, x: torch.Tensor, chosen: Sequence[torch.Tensor], places: Sequence[int]
) -> Axis | None:
    """A single list of constants that is a run (``x[:, [-2, -1]]``) is a slice; the cut axis, or None."""
    if len(chosen) != 1 or chosen[0].dim() != 1 or not table[chosen[0]].constant:
        return None
    size = x.shape[places[0]]
    numbers = [number % size for number in chosen[0].tolist()]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return span(table[x].axes[places[0]], numbers[0], numbers[0] + len(numbers))


def _index_by_mask(table: SymbolTable, call: Call, chosen: Sequence[torch.Tensor], places: Sequence[int]) -> None:
    """``x[mask]``: how many are chosen depends on the data, and which ones on the positions."""
    if len(chosen) != 1:
        raise NotImplementedError
    x, mask = call["self"], chosen[0]
    axes = table[x].axes
    after = places[0] + mask.dim()
    for axis, other in zip(axes[places[0] : after], table[mask].axes, strict=True):
        unify(axis, other)
        refuse(axis, f"chosen by a mask ({call.name})")
    new = leaf(call.out.shape[places[0]])
    refuse(new, f"chosen by a mask ({call.name})")
    table.put(call.out, (*axes[: places[0]], new, *axes[after:]))


def index_put(table: SymbolTable, call: Call) -> None:
    """``x[i] = values``: as ``x[i]``, and the values have its axes."""
    x, indices, values = call["self"], list(call["indices"]), call["values"]
    axes = table[x].axes
    places = [place for place, item in enumerate(indices) if item is not None]
    chosen = [indices[place] for place in places]
    if any(item.dtype == torch.bool for item in chosen) and values.numel() > 1:
        raise NotImplementedError
    if values.dim() and values.numel() > 1:
        for place, item in zip(places, chosen, strict=True):
            _look_up(table, call, axes[place], item)
        if not all(after == before + 1 for before, after in pairwise(places)):
            raise NotImplementedError
        kept = [axis for dim, axis in enumerate(axes) if dim not in places]
        target = (*kept[: places[0]], *table.broadcast(chosen), *kept[places[0] :])
        _unify_broadcast(target, table[values].axes)
    else:
        for place in places:
            refuse(axes[place], f"chosen by an index ({call.name})")
    table.index_arithmetic(call, (x, values))
    table.put(call.out, axes)


def _unify_broadcast(target: Sequence[Axis], axes: Sequence[Axis]) -> None:
    for axis, other in zip(reversed(target), reversed(axes), strict=False):
        if axis and other:
            unify(axis, other)


def index_select(table: SymbolTable, call: Call) -> None:
    x, indices = call["self"], call["index"]
    dim = call["dim"] % x.dim()
    axes = list(table[x].axes)
    _look_up(table, call, axes[dim], indices)
    axes[dim] = table[indices].axes[0] if indices.dim() else ()
    table.put(call.out, axes, table[x].domain)


def index_add(table: SymbolTable, call: Call) -> None:
    """``x[:, i] += source``"""
    x, indices, source = call["self"], call["index"], call["source"]
    dim = call["dim"] % x.dim()
    axes = table[x].axes
    _look_up(table, call, axes[dim], indices)
    for place, axis in enumerate(table[source].axes):
        unify(axis, axes[place] if place != dim else table[indices].axes[0])
    table.index_arithmetic(call, (x, source))
    table.put(call.out, axes)


def gather(table: SymbolTable, call: Call) -> None:
    """``out[i][j] = x[i][index[i][j]]``"""
    x, indices = call["self"], call["index"]
    dim = call["dim"] % x.dim()
    _along(table, call, x, indices, dim)
    table.put(call.out, table[indices].axes, table[x].domain)


def scatter(table: SymbolTable, call: Call) -> None:
    """``x[i][index[i][j]] = src[i][j]``, or adds it, or sets one number."""
    x, indices = call["self"], call["index"]
    dim = call["dim"] % x.dim()
    _along(table, call, x, indices, dim)
    source = call.tensors[2] if len(call.tensors) > 2 else None
    if source is not None:
        _along(table, call, source, indices, None)
    table.index_arithmetic(call, (x,) if source is None else (x, source))
    table.put(call.out, table[x].axes)


def _along(table: SymbolTable, call: Call, x: torch.Tensor, indices: torch.Tensor, dim: int | None) -> None:
    """The dimensions of ``indices`` are those of ``x``, or their beginnings, except ``dim``, which they index."""
    for place, (axis, other) in enumerate(zip(table[x].axes, table[indices].axes, strict=True)):
        if place == dim:
            _look_up(table, call, axis, indices)
        else:
            unify(split_at(axis, size_of(other))[0] if size_of(axis) != size_of(other) else axis, other)


def histogram(table: SymbolTable, call: Call) -> None:
    """``histc`` of expert numbers with one bin for each expert: the bins are the experts."""
    x, bins = call["self"], call["bins"]
    domain = table[x].domain
    if domain is None or size_of(domain) != bins or (call["min"], call["max"]) != (0, bins - 1):
        raise NotImplementedError
    mark(domain, "counted")
    table.put(call.out, (domain,))


def item(table: SymbolTable, call: Call) -> None:
    """A number leaves the recorded run: whatever it was computed from may steer the code."""
    symbol = table[call["self"]]
    for axis in (*symbol.axes, symbol.domain or ()):
        refuse(axis, "its values steer the code (.item())")


RULES: dict[str, Rule] = {
    "aten.embedding": embedding,
    "aten.index": index,
    "aten.index_put": index_put,
    "aten.index_put_": index_put,
    "aten.index_select": index_select,
    "aten.index_add": index_add,
    "aten.index_add_": index_add,
    "aten.gather": gather,
    "aten.scatter": scatter,
    "aten.scatter_": scatter,
    "aten.scatter_add": scatter,
    "aten.scatter_add_": scatter,
    "aten.histc": histogram,
    "aten._local_scalar_dense": item,
}

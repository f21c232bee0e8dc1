"""Operators that only move elements: axes are permuted, factored, merged, cut, joined and repeated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secateur.graph.axes import (
    Axis,
    join,
    leaf,
    mark,
    refuse,
    regroup,
    sever,
    size_of,
    span,
    split_at,
    split_axis,
    unify,
)
from secateur.graph.rules_elementwise import Rule
from secateur.graph.symbols import Call, SymbolTable


def _wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _put_dims(table: SymbolTable, call: Call, dims: Sequence[int | None]) -> None:
    """The result has the operand's axes in the order ``dims``; None is a new dimension of size 1."""
    symbol = table[call.tensors[0]]
    axes = [() if dim is None else symbol.axes[dim] for dim in dims]
    table.put(call.out, axes, symbol.domain, (origin.through(dims) for origin in symbol.origins))


# --- order of dimensions ------------------------------------------------------------------------------------------


def transpose(table: SymbolTable, call: Call) -> None:
    rank = call["self"].dim()
    dims = list(range(rank))
    if rank:
        one, two = _wrap(call["dim0"], rank), _wrap(call["dim1"], rank)
        dims[one], dims[two] = dims[two], dims[one]
    _put_dims(table, call, dims)


def t(table: SymbolTable, call: Call) -> None:
    _put_dims(table, call, list(range(call["self"].dim()))[::-1])


def permute(table: SymbolTable, call: Call) -> None:
    rank = call["self"].dim()
    _put_dims(table, call, [_wrap(dim, rank) for dim in call["dims"]])


def unsqueeze(table: SymbolTable, call: Call) -> None:
    rank = call["self"].dim()
    dims: list[int | None] = list(range(rank))
    dims.insert(_wrap(call["dim"], rank + 1), None)
    _put_dims(table, call, dims)


def squeeze(table: SymbolTable, call: Call) -> None:
    x = call["self"]
    asked = call["dim"] if "dim" in {argument.name for argument in call.func._schema.arguments} else None
    chosen = range(x.dim()) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {_wrap(dim, x.dim()) for dim in chosen}
    _put_dims(table, call, [dim for dim in range(x.dim()) if not (dim in gone and x.shape[dim] == 1)])


# --- shape ----------------------------------------------------------------------------------------------------------


def view(table: SymbolTable, call: Call) -> None:
    """All factors in a row, divided again at the sizes of the result."""
    x = call["self"]
    if x.dtype != call.out.dtype:
        raise NotImplementedError
    symbol = table[x]
    dims = _view_dims(x.shape, call.out.shape) if symbol.origins else ()
    table.put(
        call.out,
        regroup(symbol.axes, call.out.shape),
        symbol.domain,
        (origin.through(dims) for origin in symbol.origins),
    )


def _view_dims(before: Sequence[int], after: Sequence[int]) -> list[int | None]:
    """For each dimension of a reshaped tensor the old dimension within which it lies, if it lies within one."""
    dims: list[int | None] = []
    for place, size in enumerate(after):
        inner = math.prod(after[place + 1 :])
        homes = [
            dim
            for dim, whole in enumerate(before)
            if size > 1
            and inner % (stride := math.prod(before[dim + 1 :])) == 0
            and inner >= stride
            and inner * size <= stride * whole
        ]
        dims.append(homes[0] if homes else None)
    return dims


def expand(table: SymbolTable, call: Call) -> None:
    """A dimension of size 1 becomes many: a repeat, which is how a KV head finds its query heads."""
    x = call["self"]
    symbol = table[x]
    new = call.out.dim() - x.dim()
    axes: list[Axis] = []
    dims: list[int | None] = []
    for place, size in enumerate(call.out.shape):
        old = place - new
        if old >= 0 and x.shape[old] == size:
            axes.append(symbol.axes[old])
            dims.append(old)
        else:
            axes.append(_repeat(size))
            dims.append(None)
    table.put(call.out, axes, symbol.domain, (origin.through(dims) for origin in symbol.origins))


def _repeat(size: int) -> Axis:
    axis = leaf(size)
    mark(axis, "repeat")
    return axis


def repeat(table: SymbolTable, call: Call) -> None:
    """Tiles: each dimension becomes ``repeats x itself``."""
    symbol = table[call["self"]]
    repeats = list(call["repeats"])
    axes: list[Axis] = [()] * (len(repeats) - len(symbol.axes)) + list(symbol.axes)
    table.put(call.out, [_repeat(times) + axis for times, axis in zip(repeats, axes, strict=True)], symbol.domain)


def complex_from_pairs(table: SymbolTable, call: Call) -> None:
    """``view_as_complex``: the last dimension, of two, becomes one number."""
    x = call["self"]
    _put_dims(table, call, list(range(x.dim() - 1)))


def pairs_from_complex(table: SymbolTable, call: Call) -> None:
    """``view_as_real``: each number becomes a new last dimension of two."""
    table.put(call.out, (*table[call["self"]].axes, leaf(2)))


# --- cutting --------------------------------------------------------------------------------------------------------


def _with_axis(table: SymbolTable, x: torch.Tensor, out: torch.Tensor, dim: int, axis: Axis | None) -> None:
    """The result is ``x`` with dimension ``dim`` replaced (None: dropped)."""
    symbol = table[x]
    axes = list(symbol.axes)
    dims: list[int | None] = list(range(x.dim()))
    if axis is None:
        del axes[dim], dims[dim]
    else:
        axes[dim] = axis
    table.put(out, axes, symbol.domain, (origin.through(dims) for origin in symbol.origins))


def slice_(table: SymbolTable, call: Call) -> None:
    """Cuts at the start and the end; a step divides the axis into ``outer x step`` first."""
    x = call["self"]
    dim = _wrap(call["dim"], x.dim())
    size, step = x.shape[dim], call["step"]
    start, stop, _ = slice(call["start"], call["end"]).indices(size)
    axis = table[x].axes[dim]
    if step == 1:
        axis = span(axis, start, stop)
    elif size % step == 0 and start < step and stop > size - step + start:
        axis, offset = split_axis(axis, step)
        span(offset, start, start + 1)
    else:
        raise NotImplementedError
    _with_axis(table, x, call.out, dim, axis)


def select(table: SymbolTable, call: Call) -> None:
    x = call["self"]
    dim = _wrap(call["dim"], x.dim())
    index = call["index"] % x.shape[dim]
    span(table[x].axes[dim], index, index + 1)
    _with_axis(table, x, call.out, dim, None)


def split(table: SymbolTable, call: Call) -> None:
    """Also ``chunk`` and ``tensor_split``: the sizes are read off the results."""
    x = call["self"]
    dim = _wrap(call["dim"], x.dim())
    rest = table[x].axes[dim]
    for out in call.outputs:
        part, rest = split_at(rest, out.shape[dim])
        _with_axis(table, x, out, dim, part)


def unbind(table: SymbolTable, call: Call) -> None:
    x = call["self"]
    dim = _wrap(call["dim"], x.dim())
    axis = table[x].axes[dim]
    for index, out in enumerate(call.outputs):
        span(axis, index, index + 1)
        _with_axis(table, x, out, dim, None)


# --- joining --------------------------------------------------------------------------------------------------------


def cat(table: SymbolTable, call: Call) -> None:
    """The dimension is the concatenation of those of the operands; the others are the same."""
    tensors = [tensor for tensor in call["tensors"] if tensor.numel()]
    if not tensors:
        raise NotImplementedError("nothing but empty tensors")
    dim = _wrap(call["dim"], call.out.dim())
    _join(table, call, tensors, dim, join([table[tensor].axes[dim] for tensor in tensors]))


def stack(table: SymbolTable, call: Call) -> None:
    """A new dimension of as many units as there are operands."""
    tensors = list(call["tensors"])
    dim = _wrap(call["dim"], call.out.dim())
    first = table[tensors[0]].axes
    for tensor in tensors[1:]:
        for axis, other in zip(first, table[tensor].axes, strict=True):
            unify(axis, other)
    _put_joined(table, call, tensors, (*first[:dim], leaf(len(tensors)), *first[dim:]))


def _join(table: SymbolTable, call: Call, tensors: Sequence[torch.Tensor], dim: int, joined: Axis) -> None:
    first = table[tensors[0]].axes
    for tensor in tensors[1:]:
        for place, (axis, other) in enumerate(zip(first, table[tensor].axes, strict=True)):
            if place != dim:
                unify(axis, other)
    _put_joined(table, call, tensors, (*first[:dim], joined, *first[dim + 1 :]))


def _put_joined(table: SymbolTable, call: Call, tensors: Sequence[torch.Tensor], axes: Sequence[Axis]) -> None:
    domains = [table[tensor].domain for tensor in tensors]
    known = [domain for domain in domains if domain is not None]
    if known and len(known) == len(domains) and len({size_of(domain) for domain in known}) == 1:
        for domain in known[1:]:
            unify(known[0], domain)
        table.put(call.out, axes, known[0])
        return
    table.index_arithmetic(call, tensors)
    table.put(call.out, axes)


def pad(table: SymbolTable, call: Call) -> None:
    """Constant padding: the padded dimensions are ``before + axis + after``; a negative amount cuts."""
    x, amounts = call["self"], list(call["pad"])
    symbol = table[x]
    table.index_arithmetic(call, (x,))
    axes = list(symbol.axes)
    for place in range(len(amounts) // 2):
        dim = x.dim() - 1 - place
        before, after = amounts[2 * place : 2 * place + 2]
        axis = span(axes[dim], max(0, -before), x.shape[dim] - max(0, -after))
        sides = [[leaf(amount)] if amount > 0 else [] for amount in (before, after)]
        axes[dim] = join([*sides[0], axis, *sides[1]])
    table.put(call.out, axes)


# --- order within a dimension --------------------------------------------------------------------------------------


def triangle(table: SymbolTable, call: Call) -> None:
    """``tril``, ``triu``: rows and columns are compared by their positions."""
    axes = table[call["self"]].axes
    for axis in axes[-2:]:
        refuse(axis, f"elements are chosen by position ({call.name})")
    for out in call.outputs:
        table.put(out, axes)


def reorder(table: SymbolTable, call: Call) -> None:
    """``flip``, ``roll``: units come out in another order, so the axis must stay whole."""
    x = call["self"]
    axes = list(table[x].axes)
    dims = call["dims"] or range(x.dim())
    for dim in (_wrap(dim, x.dim()) for dim in dims):
        sever(axes[dim], f"units are reordered ({call.name})")
        axes[dim] = leaf(x.shape[dim])
        sever(axes[dim], f"units are reordered ({call.name})")
    table.put(call.out, axes)


def windows(table: SymbolTable, call: Call) -> None:
    """``unfold``: a dimension, mostly that of positions, is read in windows that overlap, so it must stay whole."""
    x = call["self"]
    dim, axes = _wrap(call["dimension"], x.dim()), list(table[x].axes)
    new = [leaf(call.out.shape[dim]), leaf(call.out.shape[-1])]
    for axis in (axes[dim], *new):
        sever(axis, f"units are read in windows ({call.name})")
    table.index_arithmetic(call, (x,))
    axes[dim] = new[0]
    table.put(call.out, (*axes, new[1]))


RULES: dict[str, Rule] = {
    "aten.transpose": transpose,
    "aten.t": t,
    "aten.permute": permute,
    "aten.unsqueeze": unsqueeze,
    "aten.squeeze": squeeze,
    "aten.view": view,
    "aten._unsafe_view": view,
    "aten.reshape": view,
    "aten._reshape_alias": view,
    "aten.view_as_complex": complex_from_pairs,
    "aten.view_as_real": pairs_from_complex,
    "aten.expand": expand,
    "aten.repeat": repeat,
    "aten.slice": slice_,
    "aten.select": select,
    "aten.split": split,
    "aten.split_with_sizes": split,
    "aten.chunk": split,
    "aten.unbind": unbind,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.constant_pad_nd": pad,
    "aten.tril": triangle,
    "aten.triu": triangle,
    "aten.flip": reorder,
    "aten.roll": reorder,
    "aten.unfold": windows,
}

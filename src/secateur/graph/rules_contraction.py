"""Products that are summed over an axis: the contracted axes are the same, the others are those of the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.graph.axes import leaf, mark, refuse, size_of, unify
from secateur.graph.rules_elementwise import Rule
from secateur.graph.symbols import Call, Origin, SymbolTable

Dims = Sequence[int | None]


def _contract(
    table: SymbolTable, left: torch.Tensor, left_dim: int, right: torch.Tensor, right_dim: int, batch: int = 0
) -> None:
    """Unify the contracted dimensions and the leading ``batch`` ones."""
    first, second = table[left].axes, table[right].axes
    unify(first[left_dim], second[right_dim])
    table.contract(left, left_dim)
    table.contract(right, right_dim)
    for dim in range(batch):
        unify(first[dim], second[dim])


def mm(table: SymbolTable, call: Call) -> None:
    """``[m, k] @ [k, n]``"""
    left, right = call["self"], call["mat2"]
    _contract(table, left, 1, right, 0)
    origins = _product_origins(table, left, (0, None), right, (None, 1))
    table.put(call.out, (table[left].axes[0], table[right].axes[1]), origins=origins)


def addmm(table: SymbolTable, call: Call) -> None:
    """``bias + [m, k] @ [k, n]``"""
    left, right = call["mat1"], call["mat2"]
    _contract(table, left, 1, right, 0)
    table.put(call.out, (table[left].axes[0], table[right].axes[1]))
    table.broadcast((call["self"], call.out))


def bmm(table: SymbolTable, call: Call) -> None:
    """``[b, m, k] @ [b, k, n]``: what the batch dimension holds besides samples is heads (or experts)."""
    left, right = call["self"], call["mat2"]
    origins = _bmm(table, left, right)
    table.put(call.out, (table[left].axes[0], table[left].axes[1], table[right].axes[2]), origins=origins)


def baddbmm(table: SymbolTable, call: Call) -> None:
    """``bias + [b, m, k] @ [b, k, n]``"""
    start, left, right = call["self"], call["batch1"], call["batch2"]
    origins = _bmm(table, left, right)
    table.put(call.out, (table[left].axes[0], table[left].axes[1], table[right].axes[2]), origins=origins)
    table.broadcast((start, call.out))
    if table[start].origins and start.dim() == 3 and origins:
        table[call.out].origins += table[start].origins


def _bmm(table: SymbolTable, left: torch.Tensor, right: torch.Tensor) -> tuple[Origin, ...]:
    _contract(table, left, 2, right, 1, batch=1)
    plain = not table[left].origins and not table[right].origins
    mark(table[left].axes[0], "head" if plain else "batch")
    return _product_origins(table, left, (0, 1, None), right, (0, None, 2))


def _product_origins(
    table: SymbolTable, left: torch.Tensor, left_dims: Dims, right: torch.Tensor, right_dims: Dims
) -> tuple[Origin, ...]:
    """A product of two weights (``B A`` of an adapter) is a weight."""
    first, second = table[left].origins, table[right].origins
    if not first or not second:
        return ()
    return tuple(o.through(left_dims) for o in first) + tuple(o.through(right_dims) for o in second)


def mv(table: SymbolTable, call: Call) -> None:
    """``[m, k] @ [k]``"""
    left, right = call["self"], call["vec"]
    _contract(table, left, 1, right, 0)
    table.put(call.out, (table[left].axes[0],))


def dot(table: SymbolTable, call: Call) -> None:
    """``[k] @ [k]``"""
    _contract(table, call["self"], 0, call["tensor"], 0)
    table.put(call.out, ())


def linear(table: SymbolTable, call: Call) -> None:
    """``[..., k] @ [n, k].T + bias[n]``"""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    _contract(table, x, x.dim() - 1, weight, 1)
    table.put(call.out, (*table[x].axes[:-1], table[weight].axes[0]))
    if bias is not None:
        unify(table[bias].axes[0], table[weight].axes[0])


def grouped_mm(table: SymbolTable, call: Call) -> None:
    """``[m, k]`` rows, sorted by expert, each with its expert's ``[e, k, n]``; ``offs`` has one entry an expert."""
    x, weights, offsets = call["self"], call["mat2"], call["offs"]
    if x.dim() != 2 or weights.dim() != 3 or call["bias"] is not None:
        raise NotImplementedError
    _contract(table, x, 1, weights, 1)
    if offsets is not None:
        unify(table[offsets].axes[0], table[weights].axes[0])
    table.put(call.out, (table[x].axes[0], table[weights].axes[2]))


def triangular_solve(table: SymbolTable, call: Call) -> None:
    """``A X = B`` for triangular ``A`` (linear attention): the leading dimensions are independent of each other.

    Rows are solved one after the other, so the axis of the equations must stay whole.
    """
    matrix, right = call["self"], call["B"]
    if not call["left"] or matrix.dim() != right.dim():
        raise NotImplementedError
    first, second = table[matrix].axes, table[right].axes
    for axis, other in zip(first[:-2], second[:-2], strict=True):
        unify(axis, other)
    for axis in (first[-2], first[-1], second[-2]):
        refuse(axis, f"equations are solved in order ({call.name})")
    table.put(call.out, second)


def convolution(table: SymbolTable, call: Call) -> None:
    """Convolution with one group (channels are contracted) or with one group for each channel (channels stay).

    Positions come out anew; sliding over them is order-dependent, but they are never cut.
    """
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    if call["transposed"]:
        raise NotImplementedError
    channels, kernel = table[x].axes[1], table[weight].axes
    if groups == 1:
        _contract(table, x, 1, weight, 1)
        out_channels = kernel[0]
    elif groups == size_of(channels) == size_of(kernel[0]):
        unify(channels, kernel[0])
        mark(channels, "depthwise convolution")
        out_channels = channels
    else:
        raise NotImplementedError
    if bias is not None:
        unify(table[bias].axes[0], out_channels)
    positions = [leaf(size) for size in call.out.shape[2:]]
    table.put(call.out, (table[x].axes[0], out_channels, *positions))


RULES: dict[str, Rule] = {
    "aten.mm": mm,
    "aten.addmm": addmm,
    "aten.bmm": bmm,
    "aten.baddbmm": baddbmm,
    "aten.mv": mv,
    "aten.dot": dot,
    "aten.linear": linear,
    "aten._grouped_mm": grouped_mm,
    "aten.linalg_solve_triangular": triangular_solve,
    "aten.convolution": convolution,
}

"""The table of all operators with a rule, and the protection of axes at other operators."""

from __future__ import annotations

from secateur.graph import (
    rules_contraction,
    rules_elementwise,
    rules_factories,
    rules_indexing,
    rules_layout,
    rules_reduction,
)
from secateur.graph.axes import Axis, leaf, sever, size_of
from secateur.graph.rules_elementwise import Rule
from secateur.graph.symbols import Call, SymbolTable

RULES: dict[str, Rule] = {
    **rules_elementwise.RULES,
    **rules_contraction.RULES,
    **rules_layout.RULES,
    **rules_reduction.RULES,
    **rules_indexing.RULES,
    **rules_factories.RULES,
}
"""Operator (all of its overloads) to the function that says what follows for the axes of its results."""


def protect(table: SymbolTable, call: Call, reason: str) -> None:
    """Protect every axis of a call that is not understood, because of ``reason``.

    A result with the shape of an operand keeps its axes. The place in the model can then still be identified.
    """
    shapes: dict[tuple[int, ...], tuple[Axis, ...]] = {}
    for tensor in call.tensors:
        symbol = table[tensor]
        if tuple(size_of(axis) for axis in symbol.axes) == tuple(tensor.shape):  # not reshaped in place meanwhile
            shapes.setdefault(tuple(tensor.shape), symbol.axes)
        for axis in (*symbol.axes, symbol.domain or ()):
            sever(axis, reason)
    for out in call.outputs:
        axes = shapes.get(tuple(out.shape)) or tuple(leaf(size) for size in out.shape)
        for axis in axes:
            sever(axis, reason)
        table.put(out, axes)

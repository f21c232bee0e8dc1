"""Operators that make tensors out of nothing: their axes are new, and the run will say what they are."""

from __future__ import annotations

from secateur.graph.axes import leaf, refuse
from secateur.graph.rules_elementwise import Rule
from secateur.graph.symbols import Call, SymbolTable


def constant(table: SymbolTable, call: Call) -> None:
    """All elements are alike (or random, or not set), so nothing is said about the axes."""
    table.put(call.out, [leaf(size) for size in call.out.shape])


def constant_like(table: SymbolTable, call: Call) -> None:
    """``zeros_like`` and its kin have the axes of their model."""
    table.put(call.out, table[call["self"]].axes)


def arange(table: SymbolTable, call: Call) -> None:
    """``arange(n)`` numbers its own units; any other range has values that a cut would make wrong."""
    axis = leaf(call.out.shape[0])
    names = {argument.name for argument in call.func._schema.arguments}
    start = call["start"] if "start" in names else 0
    step = call["step"] if "step" in names else 1
    if start == 0 and step in (1, None):
        table.put(call.out, (axis,), axis)
    else:
        refuse(axis, "its units have fixed values (arange)")
        table.put(call.out, (axis,))


def positional(table: SymbolTable, call: Call) -> None:
    """Elements that differ by their position (``eye``, ``linspace``)."""
    axes = [leaf(size) for size in call.out.shape]
    for axis in axes:
        refuse(axis, f"its units have fixed values ({call.name})")
    table.put(call.out, axes)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "aten.zeros",
            "aten.ones",
            "aten.full",
            "aten.empty",
            "aten.empty_strided",
            "aten.rand",
            "aten.randn",
            "aten.randint",
            "aten.new_zeros",
            "aten.new_ones",
            "aten.new_full",
            "aten.new_empty",
            "aten.scalar_tensor",
        ),
        constant,
    ),
    **dict.fromkeys(
        (
            "aten.zeros_like",
            "aten.ones_like",
            "aten.full_like",
            "aten.empty_like",
            "aten.rand_like",
            "aten.randn_like",
            "aten.zero_",
            "aten.fill_",
        ),
        constant_like,
    ),
    "aten.arange": arange,
    "aten.linspace": positional,
    "aten.eye": positional,
}

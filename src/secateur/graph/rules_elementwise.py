"""Operators that work element by element: the axes of all operands are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from secateur.graph.axes import Axis, leaf, mark, refuse, size_of, unify
from secateur.graph.symbols import Call, Origin, SymbolTable

Rule = Callable[[SymbolTable, Call], None]


def elementwise(table: SymbolTable, call: Call) -> None:
    """Axes of all operands are unified, with broadcasting; computing with indices protects what they index."""
    tensors = call.tensors
    table.index_arithmetic(call, tensors)
    _put(table, call, table.broadcast(tensors))


def nonlinear(table: SymbolTable, call: Call) -> None:
    """Elementwise, and noted: an axis between two projections that passes a non-linearity is a feed-forward width."""
    elementwise(table, call)
    for axis in table[call.outputs[0]].axes:
        mark(axis, "nonlinear")


def log_sigmoid(table: SymbolTable, call: Call) -> None:
    """Non-linear; its second result is scratch space for the gradient."""
    result, scratch = call.outputs
    axes = table[call["self"]].axes
    for axis in axes:
        mark(axis, "nonlinear")
    table.put(result, axes)
    table.put(scratch, [leaf(size) for size in scratch.shape])


def same_values(table: SymbolTable, call: Call) -> None:
    """The same elements in another place or type: indices remain indices."""
    symbol = table[call.tensors[0]]
    for out in call.outputs:
        table.put(out, symbol.axes, symbol.domain, symbol.origins, symbol.constant)


def copy_into(table: SymbolTable, call: Call) -> None:
    """``copy_``: the target takes the values of the source."""
    target, source = call["self"], call["src"]
    table.broadcast([target, source])
    table.put(call.out, table[target].axes, table[source].domain)


def become(table: SymbolTable, call: Call) -> None:
    """``set_``: a tensor takes the place of another (peft does this to parameters of experts)."""
    target, source = call["self"], call["source"]
    if target.shape != source.shape:
        raise NotImplementedError
    table.broadcast([target, source])


def comparison(table: SymbolTable, call: Call) -> None:
    """Indices may be compared with indices of the same axis; comparing with anything else protects the axis."""
    tensors = call.tensors
    domains = [table[tensor].domain for tensor in tensors]
    known: list[Axis] = [domain for domain in domains if domain is not None]
    if len(tensors) == 2 and len(known) == 2 and size_of(known[0]) == size_of(known[1]):
        unify(known[0], known[1])
    else:
        for domain in known:
            refuse(domain, f"comparison with an index ({call.name})")
    _put(table, call, table.broadcast(tensors))


def choice(table: SymbolTable, call: Call) -> None:
    """``where``: indices remain indices when both sides index the same axis."""
    sides = [side for side in (call["self"], call["other"]) if isinstance(side, torch.Tensor)]
    known = [domain for domain in (table[side].domain for side in sides) if domain is not None]
    axes = table.broadcast(call.tensors)
    if len(known) == 2 and size_of(known[0]) == size_of(known[1]):
        unify(known[0], known[1])
        table.put(call.out, axes, known[0])
    else:
        table.index_arithmetic(call, sides)
        table.put(call.out, axes)


def _put(table: SymbolTable, call: Call, axes: tuple[Axis, ...]) -> None:
    for out in call.outputs:
        table.put(out, axes, origins=_origins(table, call.tensors, out.dim()))


def _origins(table: SymbolTable, tensors: Sequence[torch.Tensor], rank: int) -> Iterator[Origin]:
    """What is computed from nothing but parameters (and numbers) is still a weight: ``W + B A``, ``-exp(A)``."""
    tensors = [tensor for tensor in tensors if tensor.dim()]
    if all(table[tensor].origins for tensor in tensors):
        for tensor in tensors:
            new = rank - tensor.dim()
            for origin in table[tensor].origins:
                yield origin.through([None if dim < new else dim - new for dim in range(rank)])


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    """Both the plain operator and the one that works in place."""
    return {f"aten.{name}{place}": rule for name in names.split() for place in ("", "_")}


RULES: dict[str, Rule] = {
    **_named("add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin", elementwise),
    **_named("neg abs sqrt rsqrt square reciprocal sin cos ceil floor round trunc frac sign", elementwise),
    **_named(
        "clamp clamp_min clamp_max masked_fill addcmul addcdiv lerp nan_to_num dropout native_dropout", elementwise
    ),
    **_named("bitwise_and bitwise_or bitwise_not bitwise_xor logical_and logical_or logical_not", elementwise),
    **_named("polar angle", elementwise),
    **_named("isnan isinf isfinite log1p log log2 atan2", elementwise),
    **_named("__lshift__ __rshift__ bitwise_left_shift bitwise_right_shift logical_xor exp2", elementwise),
    **_named("silu gelu relu sigmoid tanh mish elu selu celu leaky_relu relu6 hardtanh hardswish", nonlinear),
    **_named("hardsigmoid softplus erf exp expm1 threshold xielu", nonlinear),
    **_named("eq ne lt le gt ge", comparison),
    "aten.log_sigmoid_forward": log_sigmoid,
    "aten.where": choice,
    "aten.copy_": copy_into,
    "aten.set_.source_Tensor": become,
    **dict.fromkeys(
        (
            "aten.clone",
            "aten._to_copy",
            "aten.alias",
            "aten.detach",
            "aten.detach_",
            "aten.lift_fresh",
            "aten.lift_fresh_copy",
            "aten.contiguous",
            "aten.positive",
            "aten._conj",
            "aten.resolve_conj",
        ),
        same_values,
    ),
}

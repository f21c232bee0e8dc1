"""What is known about the tensors of a recorded run: the axes of each, and what its values mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from secateur.graph.axes import Axis, Conflict, leaf, refuse, unify


@dataclass(frozen=True)
class Origin:
    """A tensor is made of a parameter, for instance a view of it: which dimensions are which of the parameter's."""

    parameter: str
    dims: tuple[int | None, ...]

    def through(self, dims: Sequence[int | None]) -> Origin:
        """The origin of a result whose dimension ``i`` is dimension ``dims[i]`` of this tensor (None: a new one)."""
        return Origin(self.parameter, tuple(None if dim is None else self.dims[dim] for dim in dims))


@dataclass
class Symbol:
    """What is known about one tensor."""

    axes: tuple[Axis, ...]
    domain: Axis | None = None
    """For integers that are indices: the axis that they index."""
    origins: tuple[Origin, ...] = ()
    """The parameters that it is made of, for a weight as opposed to an activation."""
    constant: bool = False
    """Its values are written in the code, and do not depend on the model or its input."""


@dataclass(frozen=True)
class Call:
    """One operator as it was called, with its arguments by their names in the operator's schema."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def name(self) -> str:
        return operator_name(self.func)

    def __getitem__(self, name: str) -> Any:
        """The argument called ``name``, or its default."""
        position, default = _signature(self.func)[name]
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default

    @property
    def by_name(self) -> dict[str, Any]:
        """The arguments that were given, by name."""
        return {**dict(zip(_signature(self.func), self.args, strict=False)), **self.kwargs}

    def again(self, arguments: Mapping[str, Any]) -> Any:
        """Call the operator with other ``arguments``, given by name."""
        schema = self.func._schema.arguments
        positional = [argument for argument in schema if not argument.kwarg_only]
        while positional and positional[-1].name not in arguments:
            positional.pop()
        args = [arguments.get(argument.name, self[argument.name]) for argument in positional]
        kwargs = {
            argument.name: arguments[argument.name]
            for argument in schema
            if argument.kwarg_only and argument.name in arguments
        }
        return self.func(*args, **kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, in order."""
        return [value for value in tree_leaves((self.args, dict(self.kwargs))) if isinstance(value, torch.Tensor)]

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [value for value in tree_leaves(self.out) if isinstance(value, torch.Tensor)]


@cache
def operator_name(func: torch._ops.OpOverload) -> str:
    """``aten.add`` for every overload of that operator."""
    return func._schema.name.replace("::", ".")


@cache
def _signature(func: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }


@dataclass
class SymbolTable:
    """Symbols of all tensors of a run, by identity. It keeps the tensors alive, or an identity could be reused.

    ``names`` tells which tensors are parameters or buffers of the model, by ``id``.
    """

    parameters: Mapping[int, str]
    persistent_buffers: Mapping[int, str]
    other_buffers: Mapping[int, str]
    used: dict[str, Symbol] = field(default_factory=dict)
    """Symbols of the parameters and persistent buffers that the run has used, by name."""
    contracted: dict[tuple[str, int], list[Axis]] = field(default_factory=dict)
    """What was summed over in products of a parameter: (name, axis) to that axis, or parts of it."""
    _symbols: dict[int, Symbol] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)

    def __getitem__(self, tensor: torch.Tensor) -> Symbol:
        """The symbol of ``tensor``; what enters the run from outside gets one when it is first seen."""
        known = self._symbols.get(id(tensor))
        if known is None:
            known = self._enter(tensor)
            self._symbols[id(tensor)] = known
            self._alive.append(tensor)
        return known

    def _enter(self, tensor: torch.Tensor) -> Symbol:
        symbol = Symbol(tuple(leaf(size) for size in tensor.shape))
        name = self.parameters.get(id(tensor)) or self.persistent_buffers.get(id(tensor))
        if name is not None:
            symbol.origins = (Origin(name, tuple(range(tensor.dim()))),)
            self.used[name] = symbol
            return symbol
        buffer = self.other_buffers.get(id(tensor), "").removeprefix("base_model.model.")  # as without adapters
        symbol.constant = not buffer and not tensor.is_meta
        reason = f"its size is that of the buffer {buffer}" if buffer else "its size is that of a constant in the code"
        for axis in symbol.axes:
            refuse(axis, reason)
        return symbol

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._symbols

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The parameter or buffer that ``tensor`` is, if it is one."""
        tables = (self.parameters, self.persistent_buffers, self.other_buffers)
        return next((table[id(tensor)] for table in tables if id(tensor) in table), None)

    def put(
        self,
        tensor: torch.Tensor,
        axes: Iterable[Axis],
        domain: Axis | None = None,
        origins: Iterable[Origin] = (),
        constant: bool = False,
    ) -> None:
        """Say what ``tensor``, the result of an operator, is; raises Conflict when the sizes do not fit."""
        axes = tuple(axes)
        if len(axes) != tensor.dim():
            raise Conflict(f"{len(axes)} axes for a tensor of {tensor.dim()} dimensions")
        self._symbols[id(tensor)] = Symbol(axes, domain, tuple(origins), constant)
        self._alive.append(tensor)

    def symbols(self, tensors: Iterable[torch.Tensor]) -> Iterator[Symbol]:
        return (self[tensor] for tensor in tensors)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> tuple[Axis, ...]:
        """Unify the axes of ``tensors`` by the rules of broadcasting, and return those of the result."""
        result: list[Axis] = []  # from the last dimension backwards
        for tensor in tensors:
            for place, (axis, size) in enumerate(zip(reversed(self[tensor].axes), reversed(tensor.shape), strict=True)):
                if place == len(result):
                    result.append(())
                if size == 1:
                    continue
                if result[place]:
                    unify(result[place], axis)
                else:
                    result[place] = axis
        return tuple(reversed(result))

    def contract(self, tensor: torch.Tensor, dim: int) -> None:
        """Note that ``dim`` of ``tensor`` is summed over in a product."""
        symbol = self[tensor]
        for origin in symbol.origins:
            of = origin.dims[dim]
            if of is not None:
                self.contracted.setdefault((origin.parameter, of), []).append(symbol.axes[dim])

    def index_arithmetic(self, call: Call, tensors: Iterable[torch.Tensor]) -> None:
        """Computing with indices: after a cut they would be others, so what they index must stay."""
        for symbol in self.symbols(tensors):
            if symbol.domain is not None:
                refuse(symbol.domain, f"arithmetic on an index ({call.name})")

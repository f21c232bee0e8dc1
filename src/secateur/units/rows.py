"""Rows of units in the tensors of a model: read, written, zeroed, and differentiated through ``W + s B A``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from secateur.types import NodeGroup, Role
from secateur.units.adapter import Adapter, adapter_of
from secateur.units.sums import base_members
from secateur.units.weights import active_adapters, tensor_at


@dataclass(frozen=True)
class Rows:
    """Some slices of one tensor along one axis."""

    name: str
    """Path of the tensor in the model (one of them, when it is tied)."""
    tensor: torch.Tensor
    axis: int
    index: torch.Tensor
    """``[m]``: indices along ``axis``."""

    @property
    def others(self) -> torch.Tensor:
        """Sorted indices along ``axis`` of all other slices."""
        stays = torch.ones(self.tensor.shape[self.axis], dtype=torch.bool)
        stays[self.index] = False
        return stays.nonzero().flatten()

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """``[m, ...]``: a copy, in the tensor's own type."""
        return self.tensor.movedim(self.axis, 0)[self._index]

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Write ``values``, of the shape of ``read`` and of any type, into these slices."""
        self.tensor.movedim(self.axis, 0)[self._index] = values.to(self.tensor.dtype)

    @torch.no_grad()
    def zero(self) -> None:
        """Make these slices exactly zero."""
        self.tensor.index_fill_(self.axis, self._index, 0.0)

    @property
    def _index(self) -> torch.Tensor:
        return self.index.to(self.tensor.device)


@contextmanager
def zeroed(rows: Iterable[Rows]) -> Iterator[None]:
    """A context in which these rows are zero; they are restored bit for bit afterwards."""
    with torch.no_grad():
        saved = [(one, one.tensor.index_select(one.axis, one._index)) for one in rows]
    try:
        for one, _ in saved:
            one.zero()
        yield
    finally:
        # last zeroed, first restored: a tensor may be zeroed along two of its axes
        for one, before in reversed(saved):
            with torch.no_grad():
                one.tensor.index_copy_(one.axis, one._index, before)


@dataclass(frozen=True)
class UnitRows(Rows):
    """The rows of ``n`` units in one weight or bias, with the adapter that is added to them."""

    per_unit: int
    """Rows of a unit; ``index`` has those of one unit together."""
    role: Role
    adapter: Adapter | None

    def effective(self) -> torch.Tensor:
        """``W + s B A`` of each unit, fp32, ``[n, elements]``: a copy. Gradients flow to W, A and B."""
        rows = self.tensor.movedim(self.axis, 0)[self.index].float()
        if self.adapter is not None:
            rows = rows + self.adapter.rows(self.index, self.role)
        return rows.reshape(len(self.index) // self.per_unit, -1)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat a number for each unit over its rows: ``[n] -> [m]``."""
        return values.repeat_interleave(self.per_unit)

    def by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """A number for each row, summed over those of a unit: ``[m] -> [n]``."""
        return values.reshape(-1, self.per_unit).sum(1)

    def along(self, values: torch.Tensor) -> torch.Tensor:
        """Inner product of ``s B A`` with ``values`` of the shape of ``read``, by unit, ``[n]``."""
        if self.adapter is None:
            return torch.zeros(len(self.index) // self.per_unit, device=values.device)
        return self.by_unit(self.adapter.along(values, self.index, self.role))

    @torch.no_grad()
    def absorb(self, values: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
        """Write ``factor * values + share * s B A``, factors by unit, and clear the adapter; uses up ``values``."""
        values.mul_(self.by_row(factor).view(-1, *[1] * (values.dim() - 1)))
        if self.adapter is not None:
            self.adapter.add_to(values, self.index, self.role, self.by_row(share))
        self.write(values)
        self.clear_adapter()

    def clear(self) -> None:
        """Exact zeros, without and with the adapter."""
        self.zero()
        self.clear_adapter()

    def clear_adapter(self) -> None:
        """Make ``s B A`` of these rows zero, because it was absorbed or the unit is removed."""
        if self.adapter is not None:
            self.adapter.clear(self.index, self.role)


def rows_of(model: nn.Module, group: NodeGroup, units: Sequence[int], role: Role) -> list[UnitRows]:
    """The rows of ``units`` in every weight and bias that produces them (``out``) or consumes them (``in``).

    The group lasso over these units, for example, whose gradients flow to A and B alone while W is frozen::

        found = rows_of(model, group, units, "out")
        penalty = torch.cat([rows.effective() for rows in found], dim=1).norm(dim=1).sum()

    Args:
        model: plain, or with adapters, which count through the weight that they are added to.
        group: of the graph of that model, adapters included.
        units: in the order of the result.

    Raises:
        ModelError: a weight has several active adapters, or one that is not plain LoRA.
    """
    found = []
    for member in base_members(group):
        if member.role == role:
            tensor = tensor_at(model, member.parameter)
            index = member.rows(units).flatten().to(tensor.device)
            wrapped = active_adapters(model, member.parameter)
            adapter = adapter_of(wrapped[0][0]) if wrapped else None
            found.append(UnitRows(member.parameter, tensor, member.axis, index, member.rows_per_unit, role, adapter))
    return found


def squared_norms(members: Iterable[UnitRows], values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Squared norm of each unit over all its members, ``[n]``, from ``values`` as ``read`` gives them, in fp32."""
    parts = [
        rows.by_unit(torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1).square())
        for rows, value in zip(members, values, strict=True)
    ]
    return torch.stack(parts).sum(0)

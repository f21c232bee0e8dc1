"""Hides experts from their routers: the logit of a removed expert is -inf, not 0.

Softmax, sigmoid and top-k then give the same as without the expert, in any order of a family: its share is 0, and it is
never among the best k as long as k others are left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import ModelError
from secateur.surgery.rows import removed_rows
from secateur.types import Cut, DependencyGraph, Kept
from secateur.units import Rows

_SECOND_OPERAND = {"aten.mm": 1, "aten.bmm": 1, "aten.matmul": 1, "aten.linear": 1, "aten.addmm": 2, "aten.mv": 0}
"""Products, with the place of the operand that a router's weight is."""
_DERIVED = 8
"""So many of the last tensors that were computed from a router's weight are remembered."""


@contextmanager
def unrouted(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which routers do not choose removed experts. The weights of these are not changed.

    Biases that are added to an expert's score after the router (DeepSeek-V3's correction bias) become -inf as well.
    Raises ModelError for a group of experts without a router's weight.
    """
    names = {group.name: units for group, units in Cut.keeping(graph, kept).groups if group.kind == "expert"}
    if not names:
        yield
        return
    weights, biases = _router(model, graph, {name: kept[name] for name in names})
    saved = [rows.tensor.detach().clone() for rows in biases]
    with ExitStack() as stack:
        try:
            for rows in biases:
                _fill(rows.tensor, rows.axis, rows.index)
            torch.clear_autocast_cache()  # it may hold copies of routers that would not be recognised
            stack.enter_context(_WithoutExperts(weights))
            yield
        finally:
            for rows, before in zip(biases, saved, strict=True):
                with torch.no_grad():
                    rows.tensor.copy_(before)


def _router(model: nn.Module, graph: DependencyGraph, kept: Kept) -> tuple[list[Rows], list[Rows]]:
    """Rows of removed experts in the weights of routers, and in biases that scores are corrected by."""
    weights, biases, groups = [], [], set[str]()
    for rows in removed_rows(model, graph, kept):
        sides = {group.name for group, member in graph.of_parameter(rows.name) if member.axis == rows.axis}
        consumes = any(member.role == "in" and member.axis != rows.axis for _, member in graph.of_parameter(rows.name))
        if rows.tensor.dim() == 2 and consumes:
            weights.append(rows)
            groups |= sides
        elif rows.tensor.numel() == rows.tensor.shape[rows.axis] and "bias" in rows.name.rpartition(".")[2]:
            biases.append(rows)
    missing = set(kept) - groups
    if missing:
        raise ModelError(
            f"No weight of a router chooses among {', '.join(sorted(missing))}, and it cannot be masked. Protect it "
            "(budget.protect)."
        )
    return weights, biases


def _fill(tensor: torch.Tensor, axis: int, removed: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.index_fill_(axis, removed.to(tensor.device), -torch.inf)


class _WithoutExperts(TorchDispatchMode):
    """Sets the logits of removed experts in every product with a router's weight, or with what was made of it.

    That is a copy in another type, or the sum with what an adapter adds.
    """

    def __init__(self, weights: Sequence[Rows]) -> None:
        super().__init__()
        self._removed = {_storage(rows.tensor): rows.index for rows in weights}
        self._derived: dict[int, deque[torch.Tensor]] = {}
        """Tensors computed from each weight. They are kept alive, or their storage could be reused by others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.replace("::", ".")
        place = _SECOND_OPERAND.get(name)
        if place is not None and place < len(args):
            removed = self._removed.get(_storage(args[place]))
            if removed is not None:
                out.index_fill_(-1, removed.to(out.device), -torch.inf)
        elif isinstance(out, torch.Tensor):
            for tensor in args:
                if isinstance(tensor, torch.Tensor) and tensor.shape == out.shape:
                    self._follow(_storage(tensor), out)
        return out

    def _follow(self, source: int, made: torch.Tensor) -> None:
        removed = self._removed.get(source)
        if removed is None or _storage(made) in self._removed:
            return
        known = self._derived.setdefault(source, deque())
        if len(known) == _DERIVED:
            self._removed.pop(_storage(known.popleft()), None)
        known.append(made)
        self._removed[_storage(made)] = removed


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

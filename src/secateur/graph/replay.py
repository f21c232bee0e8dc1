"""Replays a recorded forward pass with units masked and with units removed, and compares the two.

This checks a graph independently of the model's own code: the same operators run on sliced parameters, with every size
in a view or a slice computed from the axes, and once more at full size with the units masked. Masking means:

* a matrix product sees zeros at the removed positions of the axis that it contracts;
* any other reduction (mean, norm, softmax, top-k, sum) runs over the kept units only: removed ones are its neutral
  element, and its divisor counts the kept ones.

A member that is missing, misplaced or one row off makes the two differ, or makes the sliced run fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import ModelError
from secateur.graph.axes import Atom, Axis, leaves, resolve, size_of, split_axis
from secateur.graph.rules_factories import RULES as FACTORIES
from secateur.graph.symbols import Call
from secateur.graph.trace import Trace
from secateur.types import Kept


@dataclass(frozen=True)
class Replayed:
    """The result of replaying a run without some units."""

    difference: float
    """Largest absolute difference between the logits of the sliced run and those of the masked run."""
    effect: float
    """Largest absolute difference between the logits of the masked run and those of the whole model: a check of units
    that have no effect proves nothing."""


class NotReplayable(ModelError):  # noqa: N818
    """The recorded operators depend on the data: replaying them on other tokens proves nothing."""


def replay(model: nn.Module, trace: Trace, kept: Kept, dtype: torch.dtype = torch.float32) -> Replayed:
    """Replay ``trace`` on the weights of ``model`` with only the ``kept`` units (group name to unit indices).

    Groups may be protected. A group that is not named is kept whole. All numbers have type ``dtype``. Raises ModelError
    for a model on the meta device, and when the sliced operators do not fit together. Raises NotReplayable when the
    whole run cannot be replayed either.
    """
    values = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if any(tensor.is_meta for tensor in values.values()):
        raise ModelError("A model on the meta device has no weights to replay. Give a small real model of its config.")
    values = {name: _in(dtype, tensor) for name, tensor in values.items()}
    cut = AxisCut([(trace.units[name], torch.as_tensor(sorted(units))) for name, units in kept.items()])
    tokens = _tokens(trace, cut)
    with torch.no_grad():
        try:
            whole = _Run(trace, values, AxisCut([]), tokens, dtype).logits()
            masked = _Masked(trace, values, cut, tokens, dtype).logits()
        except (RuntimeError, IndexError, ValueError) as error:
            raise NotReplayable(
                f"The recorded run cannot be replayed; its operators depend on the data: {error}"
            ) from error
        try:
            sliced = _Sliced(trace, values, cut, tokens, dtype).logits()
        except (RuntimeError, IndexError, ValueError) as error:
            raise ModelError(f"The recorded operators do not fit the sliced parameters: {error}") from error
    axes = trace.table[trace.logits].axes
    left = cut.select(masked, axes)
    if left.shape != sliced.shape:
        raise ModelError(f"The sliced run gave logits of shape {tuple(sliced.shape)} instead of {tuple(left.shape)}.")
    return Replayed(float((left - sliced).abs().max()), float((cut.select(whole, axes) - left).abs().max()))


def _in(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()


def _tokens(trace: Trace, cut: AxisCut) -> torch.Tensor:
    """The recorded token ids, replaced by tokens that are still there when the vocabulary is cut."""
    domain = trace.table[trace.token_ids].domain
    there = cut.positions(domain) if domain is not None else None
    return trace.token_ids if there is None else there[trace.token_ids % len(there)]


class AxisCut:
    """Which positions of an axis are left when only some units are.

    ``kept`` has what the units are, and the indices of those that stay. Units of two leaves are all pairs, of which
    equal numbers are kept for each unit of the outer leaf. An axis with the inner leaf alone keeps this number; its
    entries are repeated from KV heads, therefore any of them will do.
    """

    def __init__(self, kept: Sequence[tuple[Axis, torch.Tensor]]) -> None:
        self._masks: dict[int, torch.Tensor] = {}
        """By the ``id`` of the leaf, or of the inner one: boolean ``[units]``."""
        self._outer: dict[int, Atom] = {}
        """By the ``id`` of the inner leaf, where there are two."""
        for units, stays in kept:
            mask = torch.zeros(size_of(units), dtype=torch.bool)
            mask[stays] = True
            self._masks[id(units[-1])] = mask
            if len(units) == 2:
                self._outer[id(units[1])] = units[0]

    def touches(self, axis: Axis) -> bool:
        return bool(self._masks) and any(id(atom) in self._masks for atom in leaves(axis))

    def mask(self, axis: Axis) -> torch.Tensor:
        """Boolean ``[size of the axis]``: which positions stay."""
        return self._within(None, axis).flatten()

    def _within(self, before: Atom | None, axis: Axis) -> torch.Tensor:
        """Boolean ``[size of before, size of the axis]``, or ``[1, ...]``: the mask of an axis within ``before``."""
        rows = before.size if before is not None else 1
        mask = torch.ones(rows, dtype=torch.bool)
        for atom in resolve(axis):
            own = self._own(before, atom)
            mask = (mask.view(-1, before.size if before is not None else 1, 1) & own).flatten()
            before = atom
        return mask.view(rows, -1)

    def _own(self, before: Atom | None, atom: Atom) -> torch.Tensor:
        """Boolean ``[size of before, size of atom]``, or ``[1, ...]`` where all units of ``before`` have the same."""
        if atom.pieces is not None:
            return torch.cat([self._within(before, piece) for piece in atom.pieces], dim=1)
        own = self._masks.get(id(atom), torch.ones(atom.size, dtype=torch.bool))
        outer = self._outer.get(id(atom))
        if outer is None:
            return own[None]
        own = own.view(outer.size, -1)
        return own if outer is before else torch.arange(atom.size)[None] < own[0].sum()

    def positions(self, axis: Axis) -> torch.Tensor | None:
        """Indices of the positions that stay, or None when all do."""
        return self.mask(axis).nonzero().flatten() if self.touches(axis) else None

    def size(self, axis: Axis) -> int:
        return int(self.mask(axis).sum())

    def before(self, axis: Axis, position: int) -> int:
        """How many positions below ``position`` stay."""
        return int(self.mask(axis)[:position].sum())

    def select(self, value: torch.Tensor, axes: Sequence[Axis], dims: Sequence[int] | None = None) -> torch.Tensor:
        """The survivors of ``value`` along ``dims`` (all by default)."""
        for dim in range(len(axes)) if dims is None else dims:
            there = self.positions(axes[dim])
            if there is not None and value.shape[dim] > 1:
                value = value.index_select(dim, there)
        return value

    def restore(self, value: torch.Tensor, axes: Sequence[Axis], dims: Sequence[int]) -> torch.Tensor:
        """The inverse of ``select``, with zeros where units are gone."""
        for dim in dims:
            there = self.positions(axes[dim])
            if there is not None:
                shape = list(value.shape)
                shape[dim] = self.mask(axes[dim]).numel()
                value = value.new_zeros(shape).index_copy(dim, there, value)
        return value


Handler = Callable[[Any, Call], Any]


class _Run:
    """The recorded operators on real values, as they were recorded."""

    handlers: ClassVar[Mapping[str, Handler]] = {}
    as_recorded: ClassVar[bool] = True
    """Whether all tensors have the shapes that they had when they were recorded."""

    def __init__(
        self, trace: Trace, values: Mapping[str, torch.Tensor], cut: AxisCut, tokens: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.trace, self.table, self.cut, self.dtype = trace, trace.table, cut, dtype
        self._parameters = values
        self._values: dict[int, torch.Tensor] = {id(trace.token_ids): self.tokens(tokens)}

    def tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def parameter(self, value: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
        """A parameter or buffer as this run sees it."""
        return value.clone()

    def logits(self) -> torch.Tensor:
        for call in self.trace.calls:
            handler = self.handlers.get(call.name, type(self).plain)
            results = tree_leaves(handler(self, call))
            for recorded, result in zip(tree_leaves(call.out), results, strict=True):
                if isinstance(recorded, torch.Tensor):
                    if self.as_recorded and result.shape != recorded.shape:
                        raise NotReplayable(
                            f"The recorded run cannot be replayed: what {call.name} returned depends on the data."
                        )
                    self._values[id(recorded)] = result
        return self[self.trace.logits]

    def __getitem__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value in this run of a tensor of the recorded one."""
        if id(tensor) not in self._values:
            name = self.table.name_of(tensor)
            value = _in(self.dtype, tensor) if name is None else self._parameters[name]
            self._values[id(tensor)] = self.parameter(value, self.table[tensor].axes)
        return self._values[id(tensor)]

    def plain(self, call: Call, /, **changed: Any) -> Any:
        """Call the operator with this run's values; ``changed`` replaces arguments by name."""
        arguments = {**call.by_name, **changed}
        if "half_to_float" in arguments:
            arguments["half_to_float"] = False
        return call.again(tree_map(self._value, arguments))

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor) and argument in self.table:
            return self[argument]
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return self.dtype if argument in (torch.float16, torch.bfloat16, torch.float32) else argument

    def axes(self, tensor: torch.Tensor) -> tuple[Axis, ...]:
        return self.table[tensor].axes

    def sizes(self, tensor: torch.Tensor) -> list[int]:
        return [self.cut.size(axis) for axis in self.axes(tensor)]


# --- at full size, with units masked --------------------------------------------------------------------------------


class _Masked(_Run):
    """The whole model, whose products see zeros and whose reductions see survivors only."""

    def contraction(self, call: Call, name: str, dim: int) -> Any:
        x = call[name]
        axis = self.axes(x)[dim]
        if not self.cut.touches(axis):
            return self.plain(call)
        return self.plain(call, **{name: self[x].index_fill(dim, (~self.cut.mask(axis)).nonzero().flatten(), 0)})

    def convolution(self, call: Call) -> Any:
        return self.contraction(call, "input", 1) if call["groups"] == 1 else self.plain(call)

    def _dims(self, call: Call, x: torch.Tensor) -> list[int]:
        """The dimensions that the operator reduces, if units are gone there."""
        asked = call.by_name.get("dim")
        asked = [asked] if isinstance(asked, int) else asked
        dims = [dim % x.dim() for dim in asked] if asked and x.dim() else range(x.dim())
        return [dim for dim in dims if self.cut.touches(self.axes(x)[dim])]

    def reduction(self, call: Call) -> Any:
        x = call["self"]
        dims = self._dims(call, x)
        return self.plain(call, self=self.cut.select(self[x], self.axes(x), dims)) if dims else self.plain(call)

    def normalisation(self, call: Call) -> Any:
        x = call["self"]
        dims = self._dims(call, x)
        return self.cut.restore(self.reduction(call), self.axes(x), dims) if dims else self.plain(call)

    def choice(self, call: Call) -> Any:
        """Top-k, max: the winners are survivors, and their indices count the whole axis."""
        x = call["self"]
        dims = self._dims(call, x)
        result = self.reduction(call)
        there = self.cut.positions(self.axes(x)[dims[0]]) if dims else None
        if there is None:
            return result
        return tree_map(lambda value: value if value.is_floating_point() else there[value], result)

    def layer_norm(self, call: Call) -> Any:
        x = call["input"]
        dims = range(x.dim() - len(call["normalized_shape"]), x.dim())
        axes = self.axes(x)
        if not any(self.cut.touches(axes[dim]) for dim in dims):
            return self.plain(call)
        changed: dict[str, Any] = {"input": self.cut.select(self[x], axes, dims)}
        changed["normalized_shape"] = [self.cut.size(axes[dim]) for dim in dims]
        for name in {"weight", "bias"} & call.by_name.keys():
            if call[name] is not None:
                changed[name] = self.cut.select(self[call[name]], self.axes(call[name]))
        result, *statistics = tree_leaves(self.plain(call, **changed))
        return self.cut.restore(result, axes, dims), *statistics

    def group_norm(self, call: Call) -> Any:
        x = call["input"]
        axes = self.axes(x)
        if not self.cut.touches(axes[1]):
            return self.plain(call)
        result, *statistics = tree_leaves(self.plain(call, **_group_norm_sizes(self, call, select=True)))
        groups, _ = split_axis(axes[1], x.shape[1] // call["group"])
        return self.cut.restore(result, axes, (1,)), *(self.cut.restore(s, ((), groups), (1,)) for s in statistics)

    handlers: ClassVar[Mapping[str, Handler]] = {
        "aten.mm": lambda run, call: run.contraction(call, "self", 1),
        "aten.addmm": lambda run, call: run.contraction(call, "mat1", 1),
        "aten.bmm": lambda run, call: run.contraction(call, "self", 2),
        "aten.baddbmm": lambda run, call: run.contraction(call, "batch1", 2),
        "aten.mv": lambda run, call: run.contraction(call, "self", 1),
        "aten.dot": lambda run, call: run.contraction(call, "self", 0),
        "aten.linear": lambda run, call: run.contraction(call, "input", call["input"].dim() - 1),
        "aten._grouped_mm": lambda run, call: run.contraction(call, "self", 1),
        "aten.convolution": convolution,
        **dict.fromkeys(
            (
                "aten.mean",
                "aten.sum",
                "aten.nansum",
                "aten.prod",
                "aten.all",
                "aten.any",
                "aten.amax",
                "aten.amin",
                "aten.logsumexp",
                "aten.var",
                "aten.std",
                "aten.var_mean",
                "aten.std_mean",
                "aten.linalg_vector_norm",
                "aten.norm",
            ),
            reduction,
        ),
        **dict.fromkeys(
            (
                "aten._softmax",
                "aten._safe_softmax",
                "aten._log_softmax",
                "aten.softmax",
                "aten.cumsum",
                "aten.cumprod",
                "aten.logcumsumexp",
            ),
            normalisation,
        ),
        **dict.fromkeys(("aten.max", "aten.min", "aten.argmax", "aten.argmin", "aten.topk"), choice),
        "aten.native_layer_norm": layer_norm,
        "aten._fused_rms_norm": layer_norm,
        "aten.native_group_norm": group_norm,
    }


def _group_norm_sizes(run: _Run, call: Call, select: bool) -> dict[str, Any]:
    """Arguments of a group norm over what is left; ``select``: the operands still have their full size."""
    x = call["input"]
    axes = run.axes(x)
    groups, _ = split_axis(axes[1], x.shape[1] // call["group"])
    changed: dict[str, Any] = {"C": run.cut.size(axes[1]), "group": run.cut.size(groups)}
    if select:
        changed["input"] = run.cut.select(run[x], axes, (1,))
        for name in ("weight", "bias"):
            if call[name] is not None:
                changed[name] = run.cut.select(run[call[name]], run.axes(call[name]))
    return changed


# --- with units gone ------------------------------------------------------------------------------------------------


class _Sliced(_Run):
    """The operators on sliced parameters; sizes and positions in their arguments follow from the axes."""

    as_recorded = False

    def tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        domain = self.table[self.trace.token_ids].domain
        there = self.cut.positions(domain) if domain is not None else None
        return tokens if there is None else torch.searchsorted(there, tokens)

    def parameter(self, value: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
        return self.cut.select(value, axes).clone()

    def sized(self, call: Call) -> Any:
        """Views and factories: the size is that of the result."""
        return self.plain(call, size=self.sizes(call.out))

    def repeat(self, call: Call) -> Any:
        before = [1] * (call.out.dim() - call["self"].dim()) + self.sizes(call["self"])
        return self.plain(call, repeats=[new // old for new, old in zip(self.sizes(call.out), before, strict=True)])

    def slice_(self, call: Call) -> Any:
        x, step = call["self"], call["step"]
        axis = self.axes(x)[call["dim"]]
        if not self.cut.touches(axis):
            return self.plain(call)
        start, stop, _ = slice(call["start"], call["end"]).indices(x.shape[call["dim"]])
        if step != 1:
            return self.plain(call, start=start, end=self.cut.size(axis))
        return self.plain(call, start=self.cut.before(axis, start), end=self.cut.before(axis, stop))

    def select(self, call: Call) -> Any:
        x, dim = call["self"], call["dim"]
        return self.plain(call, index=self.cut.before(self.axes(x)[dim], call["index"] % x.shape[dim]))

    def split(self, call: Call) -> Any:
        sizes = [self.sizes(out)[call["dim"]] for out in call.outputs]
        return torch.split_with_sizes(self[call["self"]], sizes, call["dim"])

    def index(self, call: Call) -> Any:
        """Constants in the code that index an axis which shrank move along."""
        indices = []
        for axis, index in zip(self.axes(call["self"]), call["indices"], strict=False):
            if (
                index is not None
                and self.table[index].constant
                and index.dtype == torch.long
                and self.cut.touches(axis)
            ):
                numbers = [self.cut.before(axis, number % len(self.cut.mask(axis))) for number in index.tolist()]
                index = torch.tensor(numbers)
            indices.append(index)
        return self.plain(call, indices=[None if index is None else self._value(index) for index in indices])

    def arange(self, call: Call) -> Any:
        axis = self.axes(call.out)[0]
        return self.plain(call, end=self.cut.size(axis)) if self.cut.touches(axis) else self.plain(call)

    def histogram(self, call: Call) -> Any:
        bins = self.sizes(call.out)[0]
        return self.plain(call, bins=bins, max=bins - 1)

    def layer_norm(self, call: Call) -> Any:
        count = len(call["normalized_shape"])
        return self.plain(call, normalized_shape=self.sizes(call["input"])[-count:])

    def group_norm(self, call: Call) -> Any:
        return self.plain(call, **_group_norm_sizes(self, call, select=False))

    def convolution(self, call: Call) -> Any:
        channels = self.axes(call["input"])[1]
        if call["groups"] == 1 or not self.cut.touches(channels):
            return self.plain(call)
        return self.plain(call, groups=self.cut.size(channels))

    handlers: ClassVar[Mapping[str, Handler]] = {
        **dict.fromkeys(
            [
                "aten.view",
                "aten._unsafe_view",
                "aten.reshape",
                "aten._reshape_alias",
                "aten.expand",
                *(
                    name
                    for name in FACTORIES
                    if name.removeprefix("aten.").removeprefix("new_") in ("zeros", "ones", "full", "empty")
                ),
            ],
            sized,
        ),
        "aten.repeat": repeat,
        "aten.slice": slice_,
        "aten.select": select,
        "aten.split": split,
        "aten.split_with_sizes": split,
        "aten.chunk": split,
        "aten.index": index,
        "aten.arange": arange,
        "aten.histc": histogram,
        "aten.native_layer_norm": layer_norm,
        "aten._fused_rms_norm": layer_norm,
        "aten.native_group_norm": group_norm,
        "aten.convolution": convolution,
    }

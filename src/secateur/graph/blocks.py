"""Whole decoder layers as units: blocks that can be replaced by the identity.

A block adds to the residual stream; without it the stream is passed on unchanged. A block can be removed in this way
when the blocks run once each, one after the other, and only the next block uses its result. Both are found in the
recorded run: the operators inside of each block, and the results that they use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from secateur.graph.places import Places
from secateur.graph.symbols import Call, SymbolTable
from secateur.types import NodeGroup


@dataclass
class Span:
    """One pass through a member of a list of modules."""

    path: str
    start: int
    """Number of operators that were recorded before it began."""
    stop: int
    """The same after it ended."""
    given: torch.Tensor | None
    """The first tensor among its arguments."""
    returned: torch.Tensor | None
    """The first tensor of what it returned."""


class WatchBlocks:
    """A context that records every pass through a member of a list of modules in ``spans``.

    ``calls`` is the list of the recorded operators.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.spans: list[Span] = []
        self._calls = calls
        self._open: list[Span] = []
        self._hooks: list[RemovableHandle] = []
        self._blocks = {
            f"{path}.{name}": block
            for path, modules in model.named_modules()
            if isinstance(modules, nn.ModuleList)
            for name, block in modules.named_children()
        }

    def __enter__(self) -> WatchBlocks:
        for path, block in self._blocks.items():
            self._hooks.append(block.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(self._after))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._open.append(Span(path, len(self._calls), 0, _first_tensor((args, kwargs)), None))

        return hook

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        span = self._open.pop()
        span.stop, span.returned = len(self._calls), _first_tensor(result)
        self.spans.append(span)


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)


def find_blocks(
    model: nn.Module, table: SymbolTable, places: Places, calls: Sequence[Call], spans: Sequence[Span]
) -> NodeGroup | None:
    """The decoder layers of ``model`` as one group, cut on request; None when it has no list of layers."""
    paths = places.blocks(model)
    if not paths:
        return None
    index = {path: number for number, path in enumerate(paths)}
    passes = [span for span in spans if span.path in index]
    reason = _not_a_chain(passes, paths)
    fixed = {} if reason else _needed(table, calls, passes, index) | _only_attention(model)
    return NodeGroup(
        name="layers",
        kind="layer",
        size=len(paths),
        members=(),
        protected=reason or "protected by default: layer",
        on_request=reason is None,
        fixed=tuple(sorted(fixed.items())),
        modules=tuple(paths),
    )


def _not_a_chain(passes: Sequence[Span], paths: Sequence[str]) -> str | None:
    """Why the blocks are not one after the other on the residual stream; None when they are."""
    if len(paths) < 2:
        return "it is the only layer"
    if [span.path for span in passes] != list(paths):
        return "its layers do not run once each, one after the other"
    for span, following in pairwise(passes):
        if span.returned is None or span.returned is not following.given:
            return f"what {span.path} returns is not what the next layer takes"
    for span in passes:
        assert span.given is not None
        if span.returned is None or span.returned.shape != span.given.shape:
            return f"{span.path} returns another shape than it takes"
    return None


def _needed(
    table: SymbolTable, calls: Sequence[Call], passes: Sequence[Span], index: Mapping[str, int]
) -> dict[int, str]:
    """The blocks that something else depends on: unit → reason."""
    owner: list[int | None] = [None] * len(calls)
    for number, span in enumerate(passes):
        owner[span.start : span.stop] = [number] * (span.stop - span.start)
    made = {id(out): where for call, where in zip(calls, owner, strict=True) for out in call.outputs}
    streams = {id(span.returned): number for number, span in enumerate(passes)}
    users: dict[str, set[int | None]] = {}
    fixed: dict[int, str] = {}
    for position, (call, where) in enumerate(zip(calls, owner, strict=True)):
        for tensor in call.tensors:
            name = table.name_of(tensor)
            if name in table.parameters.values() and name is not None:
                users.setdefault(name, set()).add(where)
            source = made.get(id(tensor))
            stream = streams.get(id(tensor))
            if stream is not None:  # used by the next block, or by what follows the last one
                source = stream if where is not None else (None if stream == len(passes) - 1 else stream)
                if where == stream + 1 or where == stream:
                    continue
            if source is not None and source != where:
                user = f"layer {where}" if where is not None else _outside(position, passes)
                fixed.setdefault(source, f"{user} uses what it computes")
    for name, where_used in users.items():
        inside = {number for number in where_used if number is not None}
        for number in inside if len(where_used) > 1 else ():
            fixed.setdefault(number, f"it shares {name} with another part of the model")
    return fixed


def _only_attention(model: nn.Module) -> dict[int, str]:
    """In a stack of attention and other layers one of attention: there generation sees how long its cache is."""
    config = getattr(model, "config", None)
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) if config is not None else None
    attends = [str(kind).endswith("attention") and not str(kind).startswith("linear") for kind in types or ()]
    if any(attends) and not all(attends):
        return {attends.index(True): "generation needs a layer of attention, and this is the first"}
    return {}


def _outside(position: int, passes: Sequence[Span]) -> str:
    return "what follows the layers" if position >= passes[-1].stop else "what stands between the layers"

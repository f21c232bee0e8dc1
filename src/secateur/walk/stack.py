"""A decoder whose layers run one after the other: its forward pass can be started and stopped between two layers.

A cut in layer l does not change anything before l. Trying many cuts therefore needs only the hidden states at the input
of the layer, and runs only the layers after it. This uses the model's own forward with layers short-circuited:
attention masks, position embeddings, the head and other parts of a family are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.token_loss import LogitReader, Use, use_at
from secateur.types import DependencyGraph, NodeGroup
from secateur.walk.borrow import borrowed, input_device

_PROBE_TOKENS = 16
_TOLERANCE = 1e-4
"""Largest relative difference of logits between a whole pass and one that is started at a layer."""


class _ReachedError(Exception):
    """Carries the hidden states out of a forward pass that stops early."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__("stopped on purpose between two layers")
        self.states = states


class LayerStack:
    """The decoder layers of a model, verified to run in order and to exchange only their hidden states."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, path: str) -> None:
        self.model, self.layers, self.path = model, layers, path
        self._tuples, self._others = False, 0
        """Whether a layer returns a tuple, and how many values beside its hidden states (attention weights, say)."""

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def find(cls, model: nn.Module, graph: DependencyGraph) -> LayerStack:
        """The stack with the groups of ``graph``, tested with a few tokens.

        It costs about half a forward pass of ``_PROBE_TOKENS`` tokens for every layer.

        Raises:
            ModelError: the layers are not one list, do not run in its order, or need more than the hidden states of the
                layer before (such as keys and values of another layer). A pass cannot be started at such a layer.
        """
        paths = {path for group in graph if (path := _list_of(group)) is not None}
        if len(paths) != 1:
            found = ", ".join(sorted(paths)) or "none"
            raise ModelError(f"The decoder layers are not in one list of modules (found: {found}).")
        path = paths.pop()
        layers = model.get_submodule(path)
        if not isinstance(layers, nn.ModuleList):
            raise ModelError(f"{path} is no list of modules but a {type(layers).__name__}.")
        stack = cls(model, layers, path)
        stack._try_out()
        return stack

    def inside(self, group: NodeGroup) -> bool:
        """Whether all members of ``group`` are in its own layer. Then no earlier layer changes with the group."""
        return group.layer is not None and all(
            member.parameter.startswith(f"{self.path}.{group.layer}.") for member in group.members
        )

    def logits(self, ids: torch.Tensor, start: int = 0, states: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[n, window, vocabulary]`` of windows ``ids`` ([n, window]).

        Args:
            start: the first layer that runs; the others are skipped.
            states: ``[n, window, hidden]``, the input of layer ``start``; not needed for layer 0. ``start`` may be the
                number of layers: then only the head runs.
        """
        with torch.no_grad(), self._rerouted(start, states, None):
            logits: torch.Tensor = self._run(ids).logits
        return logits

    def read(self, reader: LogitReader, ids: torch.Tensor, use: Use, start: int, states: torch.Tensor) -> None:
        """``LogitReader.read`` for windows ``ids`` ([n, window]), with ``start`` and ``states`` as in ``logits``.

        ``reader`` is one of the model.
        """
        for rows in reader.passes(len(ids)):
            with self._rerouted(start, states[rows], None):
                reader.read(ids[rows].to(input_device(self.model)), partial(use_at, use, rows.start))

    def states(self, ids: torch.Tensor, start: int, states: torch.Tensor | None, stop: int) -> torch.Tensor:
        """Hidden states ``[n, window, hidden]`` at the input of layer ``stop`` (after layer ``stop - 1``).

        ``start`` and ``states`` as in ``logits``; ``stop`` is at least 1 and more than ``start``. Gradients are
        recorded where the caller has not switched them off.
        """
        with self._rerouted(start, states, stop):
            try:
                self._run(ids)
            except _ReachedError as reached:
                return reached.states
        raise ModelError(f"Layer {stop - 1} of {self.path} was never run.")

    def _run(self, ids: torch.Tensor) -> Any:
        return self.model(input_ids=ids.to(input_device(self.model)), use_cache=False)

    @contextmanager
    def _rerouted(self, start: int, states: torch.Tensor | None, stop: int | None) -> Iterator[None]:
        """Skip the layers before ``start``, feed ``states`` to it, and leave after layer ``stop - 1``."""
        before: list[Any] = [layer.__dict__.get("forward") for layer in self.layers]  # libraries hang hooks there
        changed: dict[int, Callable[..., Any]] = {index: self._give(None) for index in range(start - 1)}
        if start > 0:
            assert states is not None
            changed[start - 1] = self._give(states)
        if stop is not None:
            changed[stop - 1] = _leave_after(self.layers[stop - 1].forward)
        try:
            for index, forward in changed.items():
                self.layers[index].forward = forward
            yield
        finally:
            for index in changed:
                del self.layers[index].forward
                if before[index] is not None:
                    self.layers[index].forward = before[index]

    def _give(self, states: torch.Tensor | None) -> Callable[..., Any]:
        """The forward of a skipped layer: it returns ``states``, or its input when these are None."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            there = _states_in(args, kwargs)
            out = there if states is None else states.to(there.device)
            return (out, *[None] * self._others) if self._tuples else out

        return forward

    def _try_out(self) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        with borrowed(self.model):
            try:
                whole, inputs = self._watched(ids)
                for start in range(1, len(self.layers)):
                    resumed = self.logits(ids, start, inputs[start])
                    difference = float((resumed - whole).abs().max())
                    if not difference <= _TOLERANCE * max(1.0, float(whole.abs().max())):  # also refuses NaN
                        raise ModelError(
                            f"A pass that starts at layer {start} of {self.path} gives other logits (by "
                            f"{difference:.1e}): its layers exchange more than hidden states."
                        )
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
                self._check_own_pass(ids)
                raise ModelError(
                    f"A forward pass cannot be started between the layers of {self.path}: {error}"
                ) from error

    def _check_own_pass(self, ids: torch.Tensor) -> None:
        """Raise ModelError when the model cannot run from beginning to end either."""
        try:
            with torch.no_grad():
                self._run(ids)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise ModelError(
                f"The model's own forward pass fails on {_PROBE_TOKENS} tokens: {error} Try another type of weights "
                "(model.dtype=float32)."
            ) from error

    def _watched(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of a whole pass, and the inputs of each layer. Raises ModelError when layers do not run in order."""
        order: list[int] = []
        inputs: list[torch.Tensor] = []

        def hook(index: int) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                order.append(index)
                inputs.append(_states_in(args, kwargs).detach().clone())
                self._others = 0 if isinstance(out, torch.Tensor) else len(out) - 1
                self._tuples = not isinstance(out, torch.Tensor)

            return look

        handles = [
            layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(self.layers)
        ]
        try:
            whole = self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        if order != list(range(len(self.layers))):
            raise ModelError(f"The layers of {self.path} do not run in order, each once (but {order}).")
        return whole, inputs


def _list_of(group: NodeGroup) -> str | None:
    """Path of the list of layers that a group's parameters lie in; None for a group outside of the layers."""
    if group.layer is None or not group.members:
        return None
    path, number, _ = group.members[0].parameter.partition(f".{group.layer}.")
    return path if number else None


def _states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among what a decoder layer is called with."""
    states = args[0] if args else kwargs["hidden_states"]
    if not isinstance(states, torch.Tensor):
        raise TypeError("a layer was called without hidden states as its first argument")
    return states


def _leave_after(layer: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = layer(*args, **kwargs)
        raise _ReachedError(out if isinstance(out, torch.Tensor) else out[0])

    return forward

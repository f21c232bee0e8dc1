"""Logits for a few positions at a time, to be read, or for a loss and its gradient.

Logits are the largest tensors of a small model: 512 tokens of a vocabulary of 49,152 are 100 MB, of one of 262,144
540 MB, and a loss needs them three times (logits, log-softmax, gradient). They depend on the hidden state of their own
position only, therefore they need not be computed all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from secateur.errors import ModelError

_LOGITS = 1 << 23
"""Logits in one piece with gradients: 34 MB in fp32, 170 positions of a vocabulary of 49,152."""
_ROWS = 128
"""Positions that such a piece has at least, over all windows. The head's weights are read once for each piece: with
eight positions of a vocabulary of 262,144, that takes more than twice as long as the products."""
_READ = 1 << 25
"""Logits in one piece without gradients: 134 MB in fp32, 128 positions of a vocabulary of 262,144."""
_TRIAL = 4
"""Tokens of the test whether a model can be split."""


class _FinishedError(Exception):
    """Carries the output of the backbone out of a forward pass that ends before the head."""

    def __init__(self, output: Any) -> None:
        super().__init__("stopped on purpose before the head")
        self.output = output


@dataclass(frozen=True)
class Split:
    """A causal LM in two halves: its backbone, which returns hidden states, and the computation of logits from these.

    The second half is the model's own forward pass, with the finished output in place of the backbone: head, bias,
    scaling and soft-capping of the logits are those of the family.
    """

    model: nn.Module
    backbone: nn.Module
    vocabulary: int

    def states(self, ids: torch.Tensor, **options: Any) -> Any:
        """The backbone's output; its ``last_hidden_state`` is ``[batch, window, hidden]``. ``options`` are for it.

        The backbone is called as the model calls it. The head does not run.
        """
        own = self.backbone.forward

        def last(*args: Any, **kwargs: Any) -> Any:
            raise _FinishedError(own(*args, **kwargs))

        with _forward(self.backbone, last):
            try:
                self.model(input_ids=ids, use_cache=False, **options)
            except _FinishedError as finished:
                return finished.output
        raise ModelError(f"{type(self.model).__name__} did not run its backbone.")

    def logits(self, ids: torch.Tensor, output: Any, states: torch.Tensor) -> torch.Tensor:
        """``[batch, positions, vocabulary]`` from hidden states ``[batch, positions, hidden]`` of some positions.

        ``output`` is the result of ``states`` for ``ids``.
        """
        finished = replace(output, last_hidden_state=states)
        with _forward(self.backbone, lambda *args, **kwargs: finished):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def split_model(model: nn.Module, ids: torch.Tensor) -> Split | None:
    """``model`` in two halves, tried on a few tokens; None for one whose logits cannot be had in pieces.

    That is the case when a model does more than calling its backbone and then its head (several losses, a head that is
    no module), or when logits in pieces differ from those of its own forward pass.
    """
    few = ids[:1, :_TRIAL]
    with torch.no_grad():
        calls, logits = _calls(model, few)
        if len(calls) != 2 or calls[1][0] is not _head(model):
            return None
        backbone, output = calls[0]
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(output, ModelOutput) or states is None or states.shape[:2] != few.shape:
            return None
        halves = Split(model, backbone, logits.shape[-1])
        output = halves.states(few)
        pieces = [halves.logits(few, output, piece) for piece in output.last_hidden_state.split(1, dim=1)]
        error = (torch.cat(pieces, dim=1) - logits).abs().max()
        return halves if bool(error <= 0.01 * logits.abs().max()) else None


Use = Callable[[slice, slice, torch.Tensor], object]
"""What is done with a piece: numbers of its windows, its positions, its logits ``[windows, positions, vocabulary]``."""


@dataclass(frozen=True)
class Reading:
    """One forward pass of a model over some windows, up to its head."""

    states: torch.Tensor
    """``[n, window, hidden]``; the logits ``[n, window, vocabulary]`` where the model cannot be split."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """States of some positions → their logits."""
    vocabulary: int
    weights: tuple[nn.Parameter, ...] = ()
    """The parameters of the head that train; none where gradients are switched off."""
    layers: tuple[torch.Tensor, ...] = ()
    """The residual stream before each layer and at the end, ``[n, window, hidden]``; empty unless asked for."""

    def at(self, here: slice, rows: slice = slice(None)) -> torch.Tensor:
        """Logits ``[n, positions, vocabulary]`` of some positions, of all windows or of ``rows``."""
        return self.head(self.states[rows, here].contiguous())

    def pieces(self, most: int | None = None) -> Iterator[slice]:
        """The positions that have a next token, in pieces of at most ``most`` logits (default: as for gradients)."""
        batch, window = self.states.shape[:2]
        return _pieces(batch, window - 1, self.vocabulary, most or max(_LOGITS, _ROWS * self.vocabulary))

    def read(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All positions that have a next token, a piece at a time, with their logits in fp32; no gradients."""
        for here in self.pieces(_READ):
            with torch.no_grad():
                logits = self.at(here).float()
            yield here, logits


class LogitReader:
    """The logits of a causal LM, for a few positions at a time.

    Decided once, on the first tokens of ``ids``: a model that ``split_model`` can split computes its head in pieces.
    Any other computes whole logits, without gradients for one window after the other.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        """``ids``: ``[batch, window]``, on the device of the input embedding."""
        self.model = model
        training = [module for module in model.modules() if module.training]
        try:
            self.split = split_model(model.eval(), ids[:1, :_TRIAL])  # dropout would make the trial fail
        finally:
            for module in training:
                module.training = True

    def start(self, ids: torch.Tensor, layers: bool = False) -> Reading:
        """One forward pass over ``ids`` ([n, window]); with ``layers``, the residual stream is kept.

        Gradients are recorded where the caller has not switched them off.
        """
        options = {"output_hidden_states": True} if layers else {}
        split = self.split
        if split is None:
            output = self.model(input_ids=ids, use_cache=False, **options)
            logits: torch.Tensor = output.logits
            return Reading(logits, lambda piece: piece, logits.shape[-1], layers=_layers(output))
        output = split.states(ids, **options)
        bare = replace(output, hidden_states=None) if layers else output
        return Reading(
            output.last_hidden_state,
            lambda piece: split.logits(ids, bare, piece),
            split.vocabulary,
            _head_weights(split) if torch.is_grad_enabled() else (),
            _layers(output) if layers else (),
        )

    def passes(self, windows: int) -> Iterator[slice]:
        """The numbers of the windows that are read without gradients in one forward pass."""
        step = windows if self.split is not None else 1
        return (slice(row, row + step) for row in range(0, windows, step))

    def read(self, ids: torch.Tensor, use: Use) -> None:
        """Call ``use`` for all positions with a next token of the windows ``ids`` ([batch, window]), a piece at a time.

        ``use`` receives the windows and the positions of a piece, and its logits in fp32. No gradients.
        """
        with torch.no_grad():
            for rows in self.passes(len(ids)):
                for here, logits in self.start(ids[rows]).read():
                    use(rows, here, logits)

    def run(self, ids: torch.Tensor) -> None:
        """A forward pass over the windows ``ids`` ([batch, window]) for the sake of hooks on modules. No gradients.

        The head runs only where a hook watches it, and then sees every position once, in pieces.
        """
        with torch.no_grad():
            for rows in self.passes(len(ids)):
                reading = self.start(ids[rows])
                if self.split is not None and _is_watched(_head(self.model)):
                    for here in _pieces(len(ids), ids.shape[1], reading.vocabulary, _READ):
                        reading.at(here)


def use_at(use: Use, first: int, rows: slice, here: slice, logits: torch.Tensor) -> None:
    """``use``, with windows that are counted from ``first`` on."""
    use(slice(first + rows.start, first + rows.stop), here, logits)


def _pieces(batch: int, positions: int, vocabulary: int, most: int) -> Iterator[slice]:
    """The first positions of a window, in pieces of at most ``most`` logits, at least one position."""
    step = max(1, most // (batch * vocabulary))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def summed(reading: Reading, loss: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """The sum of ``loss`` over all pieces of a reading. Gradients flow to the states and to the head.

    Args:
        loss: logits ``[n, positions, vocabulary]`` and the positions → a scalar.
    """
    total: torch.Tensor = _Summed.apply(reading, loss, reading.states, *reading.weights)
    return total


class _Summed(torch.autograd.Function):
    """The gradients are computed piece by piece in the forward pass, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, loss: Any, states: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(states)
        of_weights = [torch.zeros_like(weight) for weight in weights]
        total = torch.zeros((), device=states.device)
        for here in reading.pieces():
            with torch.enable_grad():
                piece = states[:, here].detach().contiguous().requires_grad_()
                value = loss(reading.head(piece), here)
                found = torch.autograd.grad(value, [piece, *weights], allow_unused=True)
            total += value.detach()
            gradient[:, here] = found[0]
            for one, more in zip(of_weights, found[1:], strict=True):
                if more is not None:
                    one += more
        ctx.save_for_backward(gradient, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return None, None, *[outer[0] * gradient for gradient in ctx.saved_tensors]


class TokenLoss:
    """The mean next-token loss of a causal LM, equal to its own loss for ``labels``.

    Decided once, on the first tokens of ``ids``: when the model can be ``split_model`` and its own loss is the mean
    cross-entropy of its logits, logits come in pieces; otherwise (a router's auxiliary loss is part of it, say) the
    model's own loss is taken as it is. Both give the same gradients.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        """``ids``: ``[batch, window]``, on the device of the input embedding."""
        self.model = model
        few = ids[:1, :_TRIAL]
        with torch.no_grad():
            own = model(input_ids=few, labels=few, use_cache=False)
            plain = F.cross_entropy(own.logits[0, :-1].float(), few[0, 1:].to(own.logits.device))
        same = bool((own.loss - plain).abs() <= 1e-5 * plain.abs())
        reader = LogitReader(model, few) if same else None
        self._reader = reader if reader is not None and reader.split is not None else None

    @property
    def in_pieces(self) -> bool:
        """Whether logits come in pieces."""
        return self._reader is not None

    def __call__(self, ids: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """``weight`` times the mean loss over ``ids`` ([batch, window]), with a gradient."""
        if self._reader is None:
            own: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            return own * weight
        each = weight / ids[:, 1:].numel()

        def piece(logits: torch.Tensor, here: slice) -> torch.Tensor:
            targets = ids[:, here.start + 1 : here.stop + 1].flatten().to(logits.device)
            return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum") * each

        return summed(self._reader.start(ids), piece)

    def backward(self, ids: torch.Tensor, weight: float = 1.0) -> float:
        """Add the gradient of ``weight`` times the mean loss over ``ids`` to ``.grad``, and return that product.

        Args:
            ids: ``[batch, window]``, on the device of the input embedding.
        """
        loss = self(ids, weight)
        loss.backward()
        return float(loss.detach())


def _layers(output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(output, "hidden_states", None) or ())


def _head_weights(split: Split) -> tuple[nn.Parameter, ...]:
    model: Any = split.model
    inside = {id(parameter) for parameter in split.backbone.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    found = {id(p): p for p in [*outside, *model.get_output_embeddings().parameters()] if p.requires_grad}
    return tuple(found.values())


def _is_watched(head: nn.Module | None) -> bool:
    return head is not None and any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())


def _head(model: nn.Module) -> nn.Module | None:
    found: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return found


def _calls(model: nn.Module, ids: torch.Tensor) -> tuple[list[tuple[nn.Module, Any]], torch.Tensor]:
    """The modules that the head's owner calls directly in one forward pass, with their outputs; and the logits."""
    head = _head(model)
    owner = next((m for m in model.modules() if any(child is head for child in m.children())), model)
    calls: list[tuple[nn.Module, Any]] = []
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append((module, output))

    inside = [module for module in owner.modules() if module is not owner]
    hooks = [hook for m in inside for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return calls, logits


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which ``module`` computes ``forward``; a forward of the instance is restored afterwards."""
    before = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before

"""The next-token loss with its gradient, and logits without one. Logits are computed for a few positions at a time.

Logits are the largest tensors of a small model: 512 tokens of a vocabulary of 49,152 are 100 MB, and the loss needs
them three times (logits, log-softmax, gradient). They depend on the hidden state of their own position only, therefore
they need not be computed all at once.
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

_LOGITS = 1 << 21
"""Logits in one chunk: 8 MB in fp32, 43 positions of a vocabulary of 49,152."""
_ROWS = 128
"""Positions that a chunk has at least, over all windows. The head's weights are read once for each chunk: with eight
positions of a vocabulary of 262,144, that takes more than twice as long as the products."""
_READ = 1 << 25
"""Logits in one piece without gradients: 134 MB in fp32, 128 positions of a vocabulary of 262,144."""
_TRIAL = 4
"""Tokens of the test whether a model can be split."""


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
        """The backbone's output; its ``last_hidden_state`` is ``[batch, window, hidden]``. ``options`` are for it."""
        kept: list[Any] = []
        own = self.backbone.forward

        def first_position(*args: Any, **kwargs: Any) -> Any:
            kept.append(own(*args, **kwargs))
            return replace(kept[0], last_hidden_state=kept[0].last_hidden_state[:, :1])

        with _forward(self.backbone, first_position):
            self.model(input_ids=ids, use_cache=False, **options)
        return kept[0]

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


class LogitReader:
    """The logits of a causal LM for a few positions at a time, for reading without gradients.

    Decided once, on the first tokens of ``ids``: a model that ``split_model`` can split computes its head in pieces.
    Any other runs one window after the other, and its logits are made fp32 in pieces.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        """``ids``: ``[batch, window]``, on the device of the input embedding."""
        self.model, self.split = model, split_model(model, ids[:1, :_TRIAL])

    def read(self, ids: torch.Tensor, use: Use) -> None:
        """Call ``use`` for all positions with a next token of the windows ``ids`` ([batch, window]), a piece at a time.

        ``use`` receives the windows and the positions of a piece, and its logits in fp32.
        """
        with torch.no_grad():
            if self.split is not None:
                self._read(self.split, ids, use)
                return
            for row in range(len(ids)):
                logits = self.model(input_ids=ids[row : row + 1], use_cache=False).logits
                for here in pieces(1, ids.shape[1], logits.shape[-1], _READ):
                    use(slice(row, row + 1), here, logits[:, here].float())

    def _read(self, split: Split, ids: torch.Tensor, use: Use) -> None:
        output = split.states(ids)
        for here in pieces(len(ids), ids.shape[1], split.vocabulary, _READ):
            use(slice(0, len(ids)), here, split.logits(ids, output, output.last_hidden_state[:, here]).float())


def pieces(batch: int, window: int, vocabulary: int, most: int) -> Iterator[slice]:
    """The positions of a window that have a next token, in pieces of at most ``most`` logits, at least one position."""
    step = max(1, most // (batch * vocabulary))
    for start in range(0, window - 1, step):
        yield slice(start, min(start + step, window - 1))


class TokenLoss:
    """The mean next-token loss of a causal LM, equal to its own loss for ``labels``, for backward passes over many
    batches.

    Decided once, on the first tokens of ``ids``: when the model can be ``split_model`` and its own loss is the mean
    cross-entropy of its logits, logits come in chunks; otherwise (a router's auxiliary loss is part of it, say) the
    model's own loss is taken as it is. Both give the same gradients.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.model = model
        few = ids[:1, :_TRIAL]
        with torch.no_grad():
            own = model(input_ids=few, labels=few, use_cache=False)
            plain = F.cross_entropy(own.logits[0, :-1].float(), few[0, 1:].to(own.logits.device))
        same = bool((own.loss - plain).abs() <= 1e-5 * plain.abs())
        self.split = split_model(model, few) if same else None

    def backward(self, ids: torch.Tensor, weight: float = 1.0) -> float:
        """Add the gradient of ``weight`` times the mean loss over ``ids`` to ``.grad``, and return that product.

        Args:
            ids: ``[batch, window]``, on the device of the input embedding.
        """
        if self.split is None:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss * weight
            loss.backward()
            return float(loss.detach())
        output = self.split.states(ids)
        hidden: torch.Tensor = output.last_hidden_state
        gradient = torch.zeros_like(hidden)
        batch, window = ids.shape
        total = 0.0
        most = max(_LOGITS, _ROWS * self.split.vocabulary)
        for here in pieces(batch, window, self.split.vocabulary, most):
            states = hidden[:, here].detach().requires_grad_(hidden.requires_grad)
            targets = ids[:, here.start + 1 : here.stop + 1]
            total += _chunk(self.split, ids, output, states, targets, weight / (batch * (window - 1)))
            if states.grad is not None:
                gradient[:, here] = states.grad
        if hidden.requires_grad:
            hidden.backward(gradient)
        return total


def _chunk(
    halves: Split, ids: torch.Tensor, output: Any, states: torch.Tensor, targets: torch.Tensor, weight: float
) -> float:
    """Backward pass from the summed loss of some positions to their hidden states, and to the head if it is trained."""
    logits = halves.logits(ids, output, states).float().flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten().to(logits.device), reduction="sum") * weight
    loss.backward()
    return float(loss.detach())


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

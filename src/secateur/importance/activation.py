"""Wanda-sp: weights times the size of what flows through them (arXiv 2306.11695; structured form from FLAP's code)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.importance.base import Needs, borrowed, calibration, input_device, unscorable
from secateur.progress import track
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, stored_weight, sum_rows

if TYPE_CHECKING:
    from secateur.data import TokenBlocks


def wanda_columns(weight: torch.Tensor, axis: int, mean_square: torch.Tensor) -> torch.Tensor:
    """Mean over the outputs i of ``|W_ij| · sqrt(mean x_j²)``, a number for each input channel j.

    Args:
        weight: the consuming matrix, two axes.
        axis: its input axis (1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``).
        mean_square: ``[inputs]``, the mean of x_j² over all tokens.

    Returns:
        fp32, shape ``[inputs]``.
    """
    return weight.float().abs().mean(dim=1 - axis) * mean_square.sqrt()


@dataclass
class InputSquares:
    """Squares of what one weight is multiplied with, summed over the tokens that reach it."""

    total: torch.Tensor
    """``[matrices, inputs]``, fp32; a linear has one matrix, stacked experts have one each."""
    tokens: torch.Tensor
    """``[matrices]``: how many tokens reached each."""

    def add(self, x: torch.Tensor, matrix: int = 0) -> None:
        """Add the inputs ``x``, shape ``[..., inputs]``, of one matrix."""
        x = x.detach().flatten(0, -2).float()
        self.total[matrix] += x.square().sum(0)
        self.tokens[matrix] += len(x)

    def columns(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Wanda's score of each input channel, ``[inputs]``; each expert counts as often as it was chosen."""
        matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
        axis_of_matrix = axis - weight.dim() + 2
        share = self.tokens / self.tokens.sum().clamp_min(1)
        mean_square = self.total / self.tokens.clamp_min(1).unsqueeze(1)
        scores = [wanda_columns(w, axis_of_matrix, mean_square[e]) * share[e] for e, w in enumerate(matrices)]
        return torch.stack(scores).sum(0)


@dataclass(frozen=True)
class Activation:
    """Wanda-sp on the matrices that consume a unit (role ``in``): a score for each input channel, summed over a unit.

    All groups are scored on the activations of the dense model. Works on every module that multiplies its input with
    a two-axis ``weight`` (``nn.Linear``, GPT-2's ``Conv1D``, both inside LoRA, where ``W + s B A`` counts) and on
    stacked experts ``[experts, …, …]``, where the scores of the experts are averaged by the tokens routed to each.
    """

    batch_size: int = 4
    name: str = "wanda"
    needs: Needs = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration(blocks, self.name)

        def passes() -> None:
            steps = -(-len(text) // self.batch_size)
            for ids in track(text.batches(self.batch_size), "activations", steps):
                model(input_ids=ids.to(input_device(model)), use_cache=False)

        return self.score_during(model, graph, passes)

    def score_during(self, model: nn.Module, graph: DependencyGraph, passes: Callable[[], object]) -> Scores:
        """Scores from whatever ``passes`` runs through the model, or through the part of it that ``graph`` is in."""
        consumers = {group.name: self._consumers(model, group) for group in graph.prunable}
        members = [member for found in consumers.values() for member in found]
        with borrowed(model):
            squares = collect_inputs(model, members, passes)
        return Scores({name: _score(model, graph[name], found, squares) for name, found in consumers.items()})

    def _consumers(self, model: nn.Module, group: NodeGroup) -> list[Member]:
        members = [member for member in base_members(group) if member.role == "in"]
        if not members:
            raise unscorable(group, self.name, "no weight consumes its units")
        for member in members:
            weight = stored_weight(model, member.parameter)
            if not (_is_linear(member, weight) or _is_stacked(member, weight)):
                reason = f"{member.parameter} {list(weight.shape)} is neither a linear's weight nor stacked experts"
                raise unscorable(group, self.name, reason)
        return members


def _is_linear(member: Member, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and member.parameter.endswith(".weight")


def _is_stacked(member: Member, weight: torch.Tensor) -> bool:
    return weight.dim() == 3 and member.axis > 0


def _score(
    model: nn.Module, group: NodeGroup, members: list[Member], squares: Mapping[str, InputSquares]
) -> torch.Tensor:
    total = torch.zeros(group.size)
    for member in members:
        columns = squares[member.parameter].columns(effective_weight(model, member.parameter), member.axis)
        total += sum_rows(columns, member, group.size).cpu()
    return total


def collect_inputs(
    model: nn.Module, members: Iterable[Member], passes: Callable[[], object]
) -> dict[str, InputSquares]:
    """Call ``passes`` without gradients and collect what the ``in`` members are multiplied with, by parameter.

    Nothing stays on the model afterwards, also after an exception.
    """
    found: dict[str, InputSquares] = {}
    stacked: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for member in members:
            module = model.get_submodule(member.parameter.rpartition(".")[0])
            weight = stored_weight(model, member.parameter)
            matrices = 1 if weight.dim() == 2 else weight.shape[0]
            total = torch.zeros(matrices, weight.shape[member.axis], device=weight.device)
            squares = InputSquares(total, torch.zeros(matrices, device=weight.device))
            found[member.parameter] = squares
            if weight.dim() == 2:
                stack.callback(module.register_forward_pre_hook(_hook(squares)).remove)
            else:
                stacked[member.parameter] = weight
        if stacked:
            stack.enter_context(_experts_one_by_one(model))
            stack.enter_context(_WatchMatrices([(weight, found[name]) for name, weight in stacked.items()]))
        stack.enter_context(torch.no_grad())
        passes()
    return found


def _hook(squares: InputSquares) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: squares.add(args[0])


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Let mixture-of-experts layers multiply with one expert after the other (transformers' ``eager`` experts)."""
    switch = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if switch is None or before is None:
        yield
        return
    try:
        switch("eager")
        yield
    finally:
        switch(before)


class _WatchMatrices(TorchFunctionMode):
    """Sees every product of a tensor with one matrix of a stacked weight."""

    _PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)

    def __init__(self, weights: list[tuple[torch.Tensor, InputSquares]]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and len(args) >= 2 and isinstance(args[1], torch.Tensor):
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, x: torch.Tensor, matrix: torch.Tensor) -> None:
        for weight, squares in self.weights:
            offset = matrix.data_ptr() - weight.data_ptr()
            if matrix.dim() == 2 and 0 <= offset < weight.numel() * weight.element_size():
                squares.add(x, offset // (weight.stride(0) * weight.element_size()))
                return

"""Statistics of the inputs of weights, collected while text runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.precision import in_float64
from secateur.types import Member
from secateur.units import stored_weight


class Statistic(Protocol):
    """A statistic of the inputs of one weight."""

    def add(self, x: torch.Tensor, matrix: int = 0) -> None:
        """Add inputs ``[..., inputs]`` of one matrix. A linear has one matrix, stacked experts have one each."""
        ...


class Moments:
    """Mean, variance and mean square of the inputs over the tokens that reach each matrix; sums in float64."""

    def __init__(self, matrices: int, inputs: int) -> None:
        self.tokens = torch.zeros(matrices, dtype=torch.float64)
        """``[matrices]``: how many tokens reached each."""
        self._total = torch.zeros(matrices, inputs, dtype=torch.float64)
        self._squares = torch.zeros(matrices, inputs, dtype=torch.float64)

    @classmethod
    def of(cls, model: nn.Module, member: Member) -> Self:
        """Empty moments for the inputs of the weight that ``member`` names, along its axis."""
        weight = stored_weight(model, member.parameter)
        return cls(1 if weight.dim() == 2 else weight.shape[0], weight.shape[member.axis])

    def add(self, x: torch.Tensor, matrix: int = 0) -> None:
        """See ``Statistic``."""
        x = in_float64(x.detach().flatten(0, -2))
        if self._total.device != x.device:
            self._total, self._squares = self._total.to(x.device), self._squares.to(x.device)
        self.tokens[matrix] += len(x)
        self._total[matrix] += x.sum(0)
        self._squares[matrix] += x.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """fp32, ``[matrices, inputs]``, on the CPU."""
        return (self._total.cpu() / self._counts()).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """fp32, ``[matrices, inputs]``, on the CPU."""
        return (self._squares.cpu() / self._counts()).float()

    @property
    def variance(self) -> torch.Tensor:
        """fp32, ``[matrices, inputs]``, on the CPU, with n - 1 below."""
        spread = self._squares.cpu() - self._total.cpu().square() / self._counts()
        return (spread.clamp_min(0) / self._counts(1)).float()

    def _counts(self, less: int = 0) -> torch.Tensor:
        return (self.tokens - less).clamp_min(1).unsqueeze(1)


_TURNS = itertools.count()


class EnoughError(Exception):
    """Ends a pass whose rest is not needed; suppress it around the pass."""


class Inputs:
    """The inputs themselves, of a weight with one matrix."""

    def __init__(self, calls: int | None = None) -> None:
        """``calls``: with so many uses of the weight, the pass is ended by ``EnoughError``; None: never."""
        self.turn = -1
        """Order of first use: smaller than that of a weight that was first used later; -1 before the first use."""
        self._enough = calls
        self._calls: list[torch.Tensor] = []

    @property
    def calls(self) -> int:
        """How often the weight was used."""
        return len(self._calls)

    def add(self, x: torch.Tensor, matrix: int = 0) -> None:
        """See ``Statistic``."""
        self.turn = next(_TURNS) if self.turn < 0 else self.turn
        self._calls.append(x.detach().flatten(0, -2))
        if self.calls == self._enough:
            raise EnoughError

    @property
    def values(self) -> torch.Tensor:
        """``[tokens, inputs]``, in the order in which they were added."""
        return torch.cat(self._calls)


@contextmanager
def watched(model: nn.Module, statistics: Mapping[str, Statistic]) -> Iterator[None]:
    """A context in which every statistic receives the inputs of the weight that is its key.

    It supports linears (``nn.Linear``, GPT-2's ``Conv1D``, both inside LoRA) and stacked experts
    ``[experts, ..., ...]``. The model is restored afterwards, also after an exception.

    Args:
        statistics: path of a weight → the statistic of its inputs.
    """
    stacked: list[tuple[torch.Tensor, Statistic]] = []
    with ExitStack() as stack:
        for path, statistic in statistics.items():
            weight = stored_weight(model, path)
            if weight.dim() == 2:
                module = model.get_submodule(path.rpartition(".")[0])
                stack.callback(module.register_forward_pre_hook(_hook(statistic)).remove)
            else:
                stacked.append((weight, statistic))
        if stacked:
            stack.enter_context(_experts_one_by_one(model))
            stack.enter_context(_WatchMatrices(stacked))
        yield


def _hook(statistic: Statistic) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: statistic.add(args[0])


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

    def __init__(self, weights: list[tuple[torch.Tensor, Statistic]]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and len(args) >= 2 and isinstance(args[1], torch.Tensor):
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, x: torch.Tensor, matrix: torch.Tensor) -> None:
        for weight, statistic in self.weights:
            offset = matrix.data_ptr() - weight.data_ptr()
            if matrix.dim() == 2 and 0 <= offset < weight.numel() * weight.element_size():
                statistic.add(x, offset // (weight.stride(0) * weight.element_size()))
                return

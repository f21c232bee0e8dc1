"""Wanda-sp: weights times the size of what flows through them (arXiv 2306.11695; structured form from FLAP's code)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.importance.base import Needs, borrowed, calibration, input_device, unscorable
from secateur.importance.weights import base_members, effective_weight, other_axes, sum_rows
from secateur.progress import track
from secateur.types import DependencyGraph, Member, NodeGroup, Scores

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
    return weight.float().abs().mean(dim=other_axes(weight, axis)) * mean_square.sqrt()


@dataclass
class InputSquares:
    """Mean of the squared inputs of some modules over all the tokens that they see, collected by forward hooks."""

    modules: dict[str, nn.Module]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def collect(self, model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
        """Run the model over batches of token ids; the hooks are gone afterwards, also after an exception."""
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            with torch.no_grad():
                for ids in batches:
                    model(input_ids=ids.to(input_device(model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            self.sums[name] = self.sums.get(name, 0) + x.square().sum(0)
            self.tokens[name] = self.tokens.get(name, 0) + len(x)

        return look

    def mean_square(self, name: str, size: int) -> torch.Tensor:
        """``[size]``; zeros for a module that no token reached."""
        if name not in self.sums:
            return torch.zeros(size)
        return self.sums[name] / self.tokens[name]


@dataclass(frozen=True)
class Activation:
    """Wanda-sp on the matrices that consume a unit (role ``in``): a score for each input channel, summed over a unit.

    All groups are scored on the activations of the dense model. Works on every module that multiplies its input with
    a two-axis ``weight``: ``nn.Linear``, GPT-2's ``Conv1D``, and both inside LoRA, where ``W + s B A`` counts.
    """

    batch_size: int = 4
    name: str = "wanda"
    needs: Needs = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        blocks = calibration(blocks, self.name)
        consumers = {group.name: self._consumers(model, group) for group in graph.prunable}
        squares = InputSquares({m.parameter: _module(model, m) for members in consumers.values() for m in members})
        with borrowed(model):
            steps = -(-len(blocks) // self.batch_size)
            squares.collect(model, track(blocks.batches(self.batch_size), "activations", steps))
        return Scores({name: _score(model, graph[name], members, squares) for name, members in consumers.items()})

    def _consumers(self, model: nn.Module, group: NodeGroup) -> list[Member]:
        members = [member for member in base_members(group) if member.role == "in"]
        if not members:
            raise unscorable(group, self.name, "no weight consumes its units")
        for member in members:
            path, _, leaf = member.parameter.rpartition(".")
            weight = getattr(model.get_submodule(path), leaf)
            if leaf != "weight" or weight.dim() != 2:
                shape = list(weight.shape)
                raise unscorable(group, self.name, f"{member.parameter} {shape} is not the weight of a linear module")
        return members


def _module(model: nn.Module, member: Member) -> nn.Module:
    return model.get_submodule(member.parameter.rpartition(".")[0])


def _score(model: nn.Module, group: NodeGroup, members: list[Member], squares: InputSquares) -> torch.Tensor:
    total = torch.zeros(group.size)
    for member in members:
        weight = effective_weight(model, member.parameter)
        mean_square = squares.mean_square(member.parameter, weight.shape[member.axis]).to(weight.device)
        total += sum_rows(wanda_columns(weight, member.axis, mean_square), member, group.size).cpu()
    return total

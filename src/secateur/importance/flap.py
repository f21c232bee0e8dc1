"""FLAP (arXiv 2312.11983): how much a channel fluctuates around its mean, and a bias that stands for the mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.importance.base import Needs, borrowed, calibration, input_device, unscorable
from secateur.progress import track
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import base_members, effective_weight, sum_rows

if TYPE_CHECKING:
    from secateur.data import TokenBlocks


@dataclass
class Moments:
    """Mean and variance of what a linear takes in, over all tokens so far; fp64 sums, fp32 out."""

    count: int = 0
    total: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs ``[..., channels]``."""
        x = x.detach().flatten(0, -2).double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """``[channels]``."""
        return (torch.as_tensor(self.total) / max(self.count, 1)).float()

    @property
    def variance(self) -> torch.Tensor:
        """``[channels]``, with n − 1 below."""
        total, squares = torch.as_tensor(self.total), torch.as_tensor(self.squares)
        spread = squares - total.square() / max(self.count, 1)
        return (spread.clamp_min(0) / max(self.count - 1, 1)).float()


def fluctuation(weight: torch.Tensor, axis: int, variance: torch.Tensor) -> torch.Tensor:
    """WIFV: ``Var(X_j) · Σ_i W_ij²`` of each input channel j, ``[channels]`` (equation 5).

    Args:
        weight: the consuming matrix, two axes.
        axis: its input axis.
        variance: ``[channels]``.
    """
    return variance * weight.float().square().sum(dim=1 - axis)


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """z-scores over the channels of one module, ``[channels]``: what makes modules comparable (equation 6)."""
    spread = scores.std() if len(scores) > 1 else torch.zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


@dataclass(frozen=True)
class Fluctuation:
    """FLAP's criterion: z-scored fluctuation of the inputs of ``o_proj`` and ``down_proj``, its mean over a unit.

    All groups are measured on the dense model, as FLAP does. Scores of different groups are comparable as they are.
    """

    batch_size: int = 4
    name: str = "flap"
    needs: Needs = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        return self.from_moments(model, graph, self.measure(model, graph, blocks))

    def measure(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None) -> dict[str, Moments]:
        """Moments of the inputs of every matrix that consumes a prunable group, by parameter."""
        blocks = calibration(blocks, self.name)
        members = [member for group in graph.prunable for member in consumers(model, group, self.name)]
        moments = {member.parameter: Moments() for member in members}
        hooks = []
        try:
            for name, found in moments.items():
                module = model.get_submodule(name.rpartition(".")[0])
                hooks.append(module.register_forward_pre_hook(lambda _, args, into=found: into.add(args[0])))
            steps = -(-len(blocks) // self.batch_size)
            with borrowed(model), torch.no_grad():
                for ids in track(blocks.batches(self.batch_size), "activations", steps):
                    model(input_ids=ids.to(input_device(model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return moments

    def from_moments(self, model: nn.Module, graph: DependencyGraph, moments: Mapping[str, Moments]) -> Scores:
        """Scores from what ``measure`` found."""
        found = {}
        for group in graph.prunable:
            total = torch.zeros(group.size)
            for member in consumers(model, group, self.name):
                weight = effective_weight(model, member.parameter)
                channels = standardise(fluctuation(weight, member.axis, moments[member.parameter].variance))
                total += sum_rows(channels, member, group.size).cpu() / member.rows_per_unit
            found[group.name] = total
        return Scores(found, on_one_scale=True)


def compensation(
    model: nn.Module, graph: DependencyGraph, moments: Mapping[str, Moments], removed: Mapping[str, Iterable[int]]
) -> dict[str, torch.Tensor]:
    """Biases that make up for removed channels (section 3.4): path of the bias → its new values, ``[outputs]``.

    What the removed channels contribute on average, ``W (mean ⊙ removed)``, is added to the bias of the linear that
    consumes them. A linear without a bias starts from zero.
    """
    biases: dict[str, torch.Tensor] = {}
    for name, units in removed.items():
        for member in consumers(model, graph[name], "flap"):
            weight = effective_weight(model, member.parameter).float()
            rows = member.rows(sorted(units)).flatten().to(weight.device)
            mean = moments[member.parameter].mean.to(weight.device)[rows]
            lost = weight.index_select(member.axis, rows).movedim(member.axis, 1) @ mean
            path = f"{member.parameter.rpartition('.')[0]}.bias"
            biases[path] = biases[path] + lost.cpu() if path in biases else lost.cpu()
    there = dict(model.named_parameters())
    for path in biases.keys() & there.keys():
        old = there[path].detach()
        biases[path] = (old + biases[path].to(old.device, old.dtype)).cpu()
    return biases


def consumers(model: nn.Module, group: NodeGroup, criterion: str) -> list[Member]:
    """The linears that consume a group; ModelError when it is consumed by anything else."""
    members = [member for member in base_members(group) if member.role == "in"]
    for member in members:
        weight = model.get_parameter(member.parameter)
        if weight.dim() != 2 or not member.parameter.endswith(".weight"):
            raise unscorable(group, criterion, f"{member.parameter} is not the weight of a linear")
    if not members:
        raise unscorable(group, criterion, "no weight consumes its units")
    return members

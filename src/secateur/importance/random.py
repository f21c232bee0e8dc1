"""Random scores: the floor that every criterion has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.importance.base import Needs
from secateur.types import DependencyGraph, Scores

if TYPE_CHECKING:
    from secateur.data import TokenBlocks


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), from the seed and the group's name: other groups do not change a group's scores."""

    name: str = "random"
    needs: Needs = "nothing"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        return Scores({group.name: _uniform(seed, group.name, group.size) for group in graph.prunable})


def _uniform(seed: int, name: str, size: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(size, generator=generator)

"""Random scores: the floor that every criterion must beat."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import torch
from torch import nn

from secateur.importance.base import Criterion
from secateur.types import DependencyGraph, Scores
from secateur.walk import Calibration


class Random(Criterion):
    """Uniform in [0, 1), from the seed and the group's name: other groups do not change a group's scores."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "units drawn at random; the floor for every comparison"

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        return Scores({group.name: _uniform(seed, group.name, group.size) for group in graph.prunable})


def _uniform(seed: int, name: str, size: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(size, generator=generator)

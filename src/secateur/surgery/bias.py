"""Biases for linears that have none."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def bias_shape(module: nn.Module | None) -> tuple[int, ...] | None:
    """The shape of the bias that a linear has or could have; None for any other module."""
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    return (module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0],)


@torch.no_grad()
def give_biases(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Add a bias of zeros to the linears at these paths, and to those of the same name in all other layers.

    All layers then have the same parameters. Returns the linears that had no bias before.
    """
    alike = {_any_layer(path) for path in paths}
    given = []
    for path, module in model.named_modules():
        shape = bias_shape(module)
        if shape is not None and _any_layer(path) in alike and module.bias is None:
            module.bias = nn.Parameter(module.get_parameter("weight").new_zeros(shape))
            given.append(module)
    return given


def _any_layer(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)

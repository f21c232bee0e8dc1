"""Biases for linears that have none: what removed channels contributed on average lives on in them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, torch.Tensor]) -> None:
    """Add a vector to the output of linears, for good.

    A linear without a bias gets one; so do, with zeros, the linears of the same name in all other layers, so that
    layers have the same parameters. Args: ``biases``: path of a linear → ``[outputs]``. Raises ModelError, before
    anything is changed, for a path that is no linear of this width.
    """
    modules = dict(model.named_modules())
    for path, bias in biases.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear | Conv1D) or _outputs(module) != len(bias):
            raise ModelError(f"{path} is no linear with {len(bias)} outputs, so that it cannot take this bias.")
    alike = {_any_layer(path) for path in biases}
    for path, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and _any_layer(path) in alike and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(_outputs(module)))
    for path, bias in biases.items():
        target = modules[path].bias
        assert isinstance(target, nn.Parameter)
        target.add_(bias.to(target.device, target.dtype))


def _outputs(module: nn.Linear | Conv1D) -> int:
    return module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0]


def _any_layer(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)

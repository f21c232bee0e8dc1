"""A short hash of a model's weights, which identifies it among models of the same shapes."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_WEIGHTS_OF_A_PARAMETER = 1024
"""Number of weights of each parameter to hash, evenly spaced."""


def digest(model: nn.Module) -> str:
    """Hash of some weights of every parameter, a quick way to distinguish models of the same shapes.

    The weights are rounded to bfloat16: a model has the same hash in fp32 and in bf16 (not always in fp16, which rounds
    differently). Adapters count as parameters.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _WEIGHTS_OF_A_PARAMETER)].to(torch.bfloat16).cpu()
        found.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]

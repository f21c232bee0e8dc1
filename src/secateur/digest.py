"""A short hash of a model's weights: whether two models of the same shapes are the same one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_WEIGHTS_OF_A_PARAMETER = 1024
"""So many weights of each parameter, evenly spaced, are hashed."""


def digest(model: nn.Module) -> str:
    """Hash of some weights of every parameter, which tells two models of the same shapes apart in a moment.

    They are compared as bfloat16, so that a model is the same in fp32 and in bf16 (not always in fp16, which rounds
    elsewhere). Adapters are parameters like any other.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _WEIGHTS_OF_A_PARAMETER)].to(torch.bfloat16).cpu()
        found.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]

"""Full fine-tuning: all weights of a model train, in float32, in place of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def full_weights(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which every floating-point parameter of ``model`` has a gradient and is in float32.

    Embeddings, the output head, norms and biases are included. Tied weights stay tied, because they are one parameter.
    Parameters of 16 bits train as float32 (steps of AdamW are smaller than their resolution) and have their own type
    again at the end. Buffers do not train.
    """
    types: list[tuple[nn.Parameter, torch.dtype]] = []
    try:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                types.append((parameter, parameter.dtype))
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        yield model
    finally:
        for parameter, dtype in types:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)

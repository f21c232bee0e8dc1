"""Borrows a model for measurements: eval mode, gradients for a few parameters, and an exact restore afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def borrowed(model: nn.Module, trainable: Iterable[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """Put the model in eval mode with gradients for ``trainable`` only, and restore it exactly afterwards.

    Restores, also after an exception: every module's mode, every ``requires_grad``, every ``.grad``.

    Args:
        model: the model to borrow.
        trainable: names of the parameters that collect gradients in ``.grad``, which starts as None.

    Yields:
        The trainable parameters by name.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in trainable}
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def recomputed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """A context in which backward passes recompute the activations of each decoder layer instead of keeping them.

    It works also in eval mode, in which the model's own switch has no effect. Memory: the hidden states between layers,
    and one layer's activations. Time: one more forward pass. The gradients are the same.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if on else []
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def input_device(model: nn.Module) -> torch.device:
    """The device of the input embedding."""
    return next(model.parameters()).device

"""A quantised base (QLoRA, arXiv 2305.14314): the frozen weights in 8 or 4 bits while adapters or gates train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from secateur.errors import InputError

BaseWeights = Literal["as-is", "int8", "nf4"]


def backend(weights: BaseWeights) -> Any:
    """The module that computes with such weights; None for ``as-is``. Raises InputError when it is not installed."""
    if weights == "as-is":
        return None
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(f"A base in {weights} needs bitsandbytes: pip install 'secateur[quantised]'.") from error
    return bitsandbytes


Place = tuple[Any, str]
"""A module, and the name of one of its children."""


def check_quantisable(model: nn.Module, weights: BaseWeights) -> list[Place]:
    """The linears that can be quantised: those below adapters, or in a model without any, all but the output head.

    Raises InputError when there is none, or no backend.
    """
    if weights == "as-is":
        return []
    backend(weights)
    modules = list(model.modules())
    places: list[Place] = [(module, "base_layer") for module in modules if isinstance(module, LoraLayer)]
    if not places:
        head = model.get_output_embeddings()  # type: ignore[operator]
        places = [(module, name) for module in modules for name, child in module.named_children() if child is not head]
    places = [(owner, name) for owner, name in places if type(getattr(owner, name)) is nn.Linear]
    if not places:
        raise InputError(f"There is no plain linear to quantise to {weights}. Set method.base=as-is.")
    return places


@contextmanager
def quantised_base(model: nn.Module, weights: BaseWeights) -> Iterator[None]:
    """A context in which these linears (``check_quantisable``) compute with weights in 8 (``int8``) or 4 bits
    (``nf4``).

    The weights in full precision are kept in the CPU's memory and restored exactly: the merged and cut weights are
    never rounded copies. ``as-is`` changes nothing. It needs bitsandbytes (extra ``quantised``), which computes on CUDA
    and on the CPU. Raises InputError when it is missing, or when there is no linear to quantise.
    """
    whole: list[nn.Linear] = []
    places = check_quantisable(model, weights)
    try:
        for owner, name in places:
            base = getattr(owner, name)
            small = _quantise(base, weights)
            whole.append(base.to("cpu"))
            setattr(owner, name, small)
        yield
    finally:
        for (owner, name), base in zip(places, whole, strict=False):
            setattr(owner, name, base.to(next(getattr(owner, name).parameters()).device))


def _quantise(linear: nn.Linear, weights: BaseWeights) -> nn.Module:
    bnb = backend(weights)
    device, dtype = linear.weight.device, linear.weight.dtype
    shape: dict[str, Any] = {
        "input_features": linear.in_features,
        "output_features": linear.out_features,
        "bias": linear.bias is not None,
    }
    values = linear.weight.detach().to("cpu", copy=True)
    if weights == "int8":
        small: Any = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
        small.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    else:
        small = bnb.nn.Linear4bit(**shape, compute_dtype=dtype, quant_type="nf4")
        small.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        small.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    with torch.no_grad():
        return small.to(device)  # quantises during the move

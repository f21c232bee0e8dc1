"""LoRA over a quantised base (QLoRA, arXiv 2305.14314): the frozen weights in 8 or 4 bits while the adapters train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
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


def check_quantisable(model: PeftModel, weights: BaseWeights) -> list[LoraLayer]:
    """The wrapped linears that can be quantised. Raises InputError when there is none, or no backend."""
    if weights == "as-is":
        return []
    backend(weights)
    layers: list[LoraLayer] = [
        m for m in model.modules() if isinstance(m, LoraLayer) and type(m.get_base_layer()) is nn.Linear
    ]
    if not layers:
        raise InputError(f"There is no plain linear with an adapter to quantise to {weights}. Set method.base=as-is.")
    return layers


@contextmanager
def quantised_base(model: PeftModel, weights: BaseWeights) -> Iterator[None]:
    """A context in which every linear below an adapter computes with weights in 8 (``int8``) or 4 bits (``nf4``).

    The weights in full precision are kept in the CPU's memory and restored exactly: the merged and cut weights are
    never rounded copies. ``as-is`` changes nothing. It needs bitsandbytes (extra ``quantised``), which computes on CUDA
    and on the CPU. Raises InputError when it is missing, or when there is no linear to quantise.
    """
    if weights == "as-is":
        yield
        return
    layers = check_quantisable(model, weights)
    whole: list[nn.Linear] = []
    try:
        for layer in layers:
            base: Any = layer.base_layer
            small = _quantise(base, weights)
            whole.append(base.to("cpu"))
            layer.base_layer = small
        yield
    finally:
        for layer, base in zip(layers, whole, strict=False):
            device = next(layer.base_layer.parameters()).device
            layer.base_layer = base.to(device)


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

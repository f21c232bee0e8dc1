"""The effective weight of a parameter: as stored, dequantised, or ``W + s B A`` with LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def is_adapter_parameter(parameter: str) -> bool:
    """Whether ``parameter`` is the path of a part of a LoRA adapter (``….lora_A.default.weight``)."""
    return any(part.startswith("lora_") for part in parameter.split("."))


def lora_layer(model: nn.Module, parameter: str) -> LoraLayer | None:
    """The LoRA layer around the frozen ``parameter``, if there is one: of a linear, or of one tensor of a module.

    ``parameter`` is named as in the model with adapters (``….base_layer.weight``), or of a linear, as in the plain one.
    """
    path, _, leaf = parameter.rpartition(".")
    while True:
        layer = model.get_submodule(path)
        # peft wraps a module once for each of its stacked tensors, and names the tensor
        if isinstance(layer, LoraLayer) and getattr(layer, "parameter_name", "weight") == leaf:
            return layer
        if not path.endswith(".base_layer"):
            return None
        path = path.removesuffix(".base_layer")


def tensor_at(model: nn.Module, parameter: str) -> torch.Tensor:
    """The parameter (or buffer) at this path, itself."""
    path, _, leaf = parameter.rpartition(".")
    weight: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return weight


def stored_weight(model: nn.Module, parameter: str) -> torch.Tensor:
    """The parameter (or buffer) at this path, detached."""
    return tensor_at(model, parameter).detach()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every path that leads to it (tied ones appear under each of their names)."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as numbers, detached: as it is stored, or dequantised (8 and 4 bit of bitsandbytes).

    Any other format is read by running the module on unit vectors. A dequantised weight is a new tensor, which only the
    caller references. Shape ``[out, in]`` (GPT-2's ``Conv1D``: as stored).
    """
    weight: Any = module.weight
    kind = type(weight).__name__
    if weight.is_floating_point() and type(weight) in (torch.Tensor, nn.Parameter):
        return torch.as_tensor(weight.detach())
    with torch.no_grad():
        if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state))
        if kind == "Int8Params":
            from bitsandbytes.functional import int8_vectorwise_dequant

            # the first forward pass hands the scales over from the parameter to the module's state
            state: Any = getattr(module, "state", None)
            scales = weight.SCB if weight.SCB is not None else state.SCB
            return torch.as_tensor(int8_vectorwise_dequant(weight.data, scales))
        return _by_unit_vectors(module)


def _by_unit_vectors(module: nn.Module) -> torch.Tensor:
    """``[out, in]``: column j is what the module makes of the j-th unit vector, less what it makes of zero."""
    inputs = int(module.in_features)  # type: ignore[arg-type]
    unit = torch.eye(inputs, device=next(module.parameters()).device)
    columns: torch.Tensor = module(unit) - module(torch.zeros_like(unit[:1]))
    return columns.T.float()


def adapter_delta(model: nn.Module, parameter: str) -> torch.Tensor | None:
    """``s B A`` of the active adapters of ``parameter``, detached and of its shape; None when there are none.

    It is a new tensor, which only the caller references.
    """
    deltas = [layer.get_delta_weight(name).detach() for layer, name in active_adapters(model, parameter)]
    return torch.as_tensor(sum(deltas)) if deltas else None


def active_adapters(model: nn.Module, parameter: str) -> list[tuple[Any, str]]:
    """The LoRA layer and the name of each active adapter of ``parameter`` (not merged, not off)."""
    layer = lora_layer(model, parameter)
    if layer is None or layer.merged or layer.disable_adapters:
        return []
    return [(layer, adapter) for adapter in layer.active_adapters if adapter in layer.scaling]


def effective_weight(model: nn.Module, parameter: str) -> torch.Tensor:
    """The effective values of ``parameter``, detached: ``W``, or ``W + s B A`` for a LoRA-wrapped weight.

    They have the shape of the parameter. The sum is a new tensor, which only the caller references.
    """
    weight, delta = stored_weight(model, parameter), adapter_delta(model, parameter)
    return weight if delta is None else weight + delta.to(weight.dtype)

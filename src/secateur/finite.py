"""Finds the place where NaN or infinity begins in a model. Careless comparisons do not detect them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def first_not_finite(model: nn.Module, ids: torch.Tensor) -> str | None:
    """The place where NaN or infinity begins for ``ids`` ``[batch, length]``; None when all logits are finite.

    It is the name of the first parameter with such a value. If there is none, it is the name of the first module, in
    the order of computation, with such an output (the class of ``model`` if no module within it has one). The model
    runs once in its present mode, and is not changed. Its weights must not be on the meta device.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if not found and not all_finite(output):
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            output = model(input_ids=ids, **_without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    logits = output if isinstance(output, torch.Tensor) else output.logits
    if all_finite(logits):
        return None
    broken = (name for name, parameter in model.named_parameters() if not all_finite(parameter.detach()))
    return next(broken, None) or next(iter(found), type(model).__name__)


def all_finite(values: Any) -> bool:
    """Whether every floating-point tensor in ``values`` (nested as a module may return them) is without NaN and inf."""
    return all(
        bool(value.isfinite().all())
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    )


def _without_cache(model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}

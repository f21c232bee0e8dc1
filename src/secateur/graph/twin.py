"""A weightless copy of a model: same modules, same code, parameters on the meta device; the model is not touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def twin_of(model: nn.Module, weights: bool = False) -> nn.Module:
    """Copy ``model`` without its parameters (or sharing them, if ``weights``), in eval mode, without hooks.

    Buffers and tensors in plain attributes are copied to the CPU, since code may look at their values.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        source = parameter.detach() if weights else torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(source, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone() if buffer.is_meta else buffer.detach().cpu().clone()
    for module in model.modules():
        for name in _HOOKS:
            if name in module.__dict__:
                memo[id(module.__dict__[name])] = OrderedDict()
    twin = copy.deepcopy(model, memo)
    _configure(twin)
    return twin.eval()


def _configure(twin: nn.Module) -> None:
    """No caches, and, where a model offers a choice, implementations whose operators do not depend on the data.

    Fused attention becomes the eager one; experts are gathered for each token rather than looped over.
    """
    for config in {id(config): config for config in map(_config, twin.modules()) if config is not None}.values():
        config.use_cache = False
        if getattr(config, "_attn_implementation_internal", None) not in (None, "eager", "sdpa"):
            config._attn_implementation_internal = "eager"
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "batched_mm"


def _config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if hasattr(config, "_attn_implementation_internal") else None

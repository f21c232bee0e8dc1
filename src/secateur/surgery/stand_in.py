"""A small model of the same configuration that stands in for a large one, or for one without weights, in checks."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.types import DependencyGraph, NodeGroup

VOCABULARY = 512


def stand_in(model: PreTrainedModel | PeftModel, graph: DependencyGraph) -> PreTrainedModel | PeftModel:
    """The first layers of the configuration, with random fp32 weights, a small vocabulary, and the adapters.

    So many layers that every kind of layer occurs, and at least two where the model has them. Layers that an earlier
    round has pruned to different sizes are of one kind. Raises ModelError when the class of ``model`` cannot be built
    from its config, or when the layers are then not those of ``model``.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = _fewer_layers(copy.deepcopy(base.config), layers_needed(graph))
    try:
        small: Any = type(base)._from_config(config, attn_implementation=base.config._attn_implementation).float()
    except Exception as error:
        raise ModelError(f"Cannot build a {type(base).__name__} with few layers to check: {error}") from error
    if isinstance(model, PeftModel):
        small = get_peft_model(small, copy.deepcopy(model.active_peft_config))
    for name, parameter in small.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # zero at first, which would hide mistakes
            nn.init.normal_(parameter, std=0.02)
    known = {(group.name, group.size, signature(group)) for group in graph}
    for group in trace(small):
        if group.layer is not None and (group.name, group.size, signature(group)) not in known:
            raise ModelError(f"{group.name} of a model with few layers is not that of this {graph.model_type} model.")
    return small.eval()


def signature(group: NodeGroup) -> tuple[Any, ...]:
    """What a group has in common with that of other layers of the same kind, whatever their sizes."""
    members = tuple(
        (
            re.sub(rf"\.{group.layer}\.", ".*.", member.parameter, count=1),
            member.axis,
            member.role,
            len(member.offsets),
            member.width,
        )
        for member in group.members
    )
    return group.kind, group.size > 1, group.protected, members


def layers_needed(graph: DependencyGraph) -> int:
    """How many of the first layers hold one of every kind."""
    layers: dict[int, list[Any]] = {}
    for group in graph:
        if group.layer is not None:
            layers.setdefault(group.layer, []).append(signature(group))
    first: dict[Any, int] = {}
    for index in sorted(layers):
        first.setdefault(tuple(layers[index]), index)
    return max(1, *first.values()) + 1 if first else 1


def _fewer_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    whole = config.num_hidden_layers
    sizes = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:  # such as layer_types
            setattr(config, name, value[:layers])
    config.num_hidden_layers = min(whole, layers)
    if sizes is not None:
        config.per_layer_config = {layer: own for layer, own in sizes.items() if int(layer) < layers}
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config

"""A small model of the same configuration, for checks of a large model or of one without weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.surgery.narrower import narrower
from secateur.surgery.rebuild import before_listing, family_of, is_listed
from secateur.types import DependencyGraph, NodeGroup

VOCABULARY = 512
WIDE_UP_TO = 300_000_000
"""Largest number of parameters of a stand-in that cannot be made narrower."""
NARROW_FROM = 20_000_000
"""A stand-in with more parameters is made narrower: checks then cost only seconds and megabytes."""
_WINDOW = 8
"""Tokens that local attention of a stand-in sees: more than a recorded run has, fewer than a long text of checks."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")
"""Names of sizes that decide from which length on a text is read in another way."""
_REFUSALS = (AttributeError, NotImplementedError, StrictDataclassError, TypeError, ValueError)
"""What configs raise that cannot have other sizes."""


def stand_in(model: PreTrainedModel | PeftModel, graph: DependencyGraph) -> PreTrainedModel | PeftModel:
    """A model of the first layers of the configuration, with random fp32 weights, a small vocabulary, and the adapters.

    It has enough layers for every kind of layer, and at least two if the model has them. Layers that an earlier round
    has pruned to different sizes are of one kind. Wide layers are made narrower, if that changes nothing but sizes.
    Raises ModelError when the class of ``model`` cannot be built from its config, or when the layers are not equal to
    those of ``model``.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(getattr(base, "config", None), PretrainedConfig) or not hasattr(base, "_from_config"):
        raise ModelError(f"A {type(base).__name__} is not built from a config of transformers.")
    try:
        config = _short_windows(_fewer_layers(copy.deepcopy(base.config), layers_needed(graph)))
        if is_listed(config):
            _list_what_is_there(base, config)
    except _REFUSALS as error:
        raise ModelError(f"The config of a {type(base).__name__} cannot have fewer layers: {error}") from error
    config, wide = _with_low_towers(type(base), config)
    if sum(parameter.numel() for parameter in wide.parameters()) > NARROW_FROM:
        try:
            family = family_of(base) if is_listed(config) else type(base)
            return _built(model, family, narrower(before_listing(copy.deepcopy(config))), graph, sizes=False)
        except (ModelError, *_REFUSALS) as error:
            if sum(parameter.numel() for parameter in wide.parameters()) > WIDE_UP_TO:
                raise ModelError(f"No small model stands for this {graph.model_type} model: {error}") from error
    return _built(model, type(base), config, graph, sizes=True)


def _with_low_towers(family: Any, config: PretrainedConfig) -> tuple[PretrainedConfig, Any]:
    """``config`` with one layer in each part that is not for text, where the family can be built so; and that model.

    What reads pictures or sounds does not run when a cut is checked, and may be most of a stand-in.
    """
    low = copy.deepcopy(config)
    text = low.get_text_config()
    for name in low.sub_configs if text is not low else ():
        part = getattr(low, name, None)
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(part, PretrainedConfig) and part is not text and isinstance(layers, int):
            _first_layers(part, layers, 1)
    try:
        return low, _on_meta(family, low)
    except ModelError:
        return config, _on_meta(family, config)


def _on_meta(family: Any, config: PretrainedConfig) -> Any:
    try:
        with torch.device("meta"):
            return family._from_config(copy.deepcopy(config))
    except Exception as error:
        raise ModelError(f"Cannot build a {family.__name__} with few layers to check: {error}") from error


def _list_what_is_there(base: Any, config: PretrainedConfig) -> None:
    """Drop from a config that lists tensors those of layers that it does not count any more."""
    there = {name for name, _ in _on_meta(family_of(base), before_listing(copy.deepcopy(config))).named_modules()}
    listed = {
        part: {name: value for name, value in config.pruned_layers[part].items() if _module(name) in there}
        for part in ("tensors", "numbers")
    }
    config.pruned_layers = {**config.pruned_layers, **listed}


def _module(name: str) -> str:
    return name.rpartition(".")[0].removesuffix(".config")


def _built(model: Any, family: Any, config: PretrainedConfig, graph: DependencyGraph, sizes: bool) -> Any:
    """A model of ``config``, when its groups are those of ``graph`` (but for the vocabulary, and ``sizes``)."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        small: Any = family._from_config(config, attn_implementation=base.config._attn_implementation).float()
    except Exception as error:
        raise ModelError(f"Cannot build a {family.__name__} with few layers to check: {error}") from error
    if isinstance(model, PeftModel):
        small = get_peft_model(small, copy.deepcopy(model.active_peft_config))
    randomise(small)

    def facts(group: NodeGroup) -> tuple[Any, ...]:
        return (group.name, group.size if sizes else None, signature(group))

    known = {facts(group) for group in graph}
    for group in trace(small):
        if group.layer is not None and facts(group) not in known:
            raise ModelError(f"{group.name} of a model with few layers is not that of this {graph.model_type} model.")
    return small.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, in place: weights of unit gain, biases and norm weights off their neutral values.

    Weights as small as most configs draw them would hide mistakes: attention scores are then so near to zero that
    softmax is flat, whatever a cut does to them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


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
    protected = None if group.on_request else group.protected
    if group.layer is None:  # it has members in every layer, however many there are
        return group.kind, group.size > 1, protected, group.name
    return group.kind, group.size > 1, protected, members


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
    """``config``, changed in place; raises ModelError for one that does not count its layers."""
    text = config.get_text_config()
    whole = getattr(text, "num_hidden_layers", None)
    if not isinstance(whole, int):
        raise ModelError(f"The config of this {config.model_type} model does not count its layers.")
    sizes = text.to_dict().get("per_layer_config")
    text.per_layer_config = None
    _first_layers(text, whole, layers)
    if sizes is not None:
        text.per_layer_config = {layer: own for layer, own in sizes.items() if int(layer) < layers}
    if text is config and not is_listed(config):  # ids of images lie beyond a small vocabulary, and lists name sizes
        config.vocab_size = min(config.vocab_size, VOCABULARY)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, 0)
    return config


def _first_layers(config: PretrainedConfig, whole: int, layers: int) -> None:
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:  # such as layer_types
            setattr(config, name, value[:layers])
    config.num_hidden_layers = min(whole, layers)


def _short_windows(config: PretrainedConfig) -> PretrainedConfig:
    """``config``, changed in place so that a few tokens are a long text."""
    text = config.get_text_config()
    ropes = [value for value in vars(text).values() if isinstance(value, dict)]
    ropes += [value for rope in ropes for value in rope.values() if isinstance(value, dict)]
    for sizes in (vars(text), *ropes):
        for name in _WINDOWS:
            if isinstance(size := sizes.get(name), int) and size > _WINDOW:
                sizes[name] = _WINDOW
    if "num_random_blocks" in vars(text):  # BigBird reads sparsely what is longer than some blocks
        text.block_size = 2
    return config

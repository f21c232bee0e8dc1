"""The config of a model whose sizes no family's config can describe: it lists the smaller tensors.

It is for models of several parts, families whose layers differ in size by design, stacks whose length is not in the
config, and scales that a family computes from the hidden width. Other models use the other forms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.export.layers import without_layer_sizes
from secateur.surgery.attributes import PATTERNS
from secateur.surgery.configs import settings_of
from secateur.surgery.rebuild import auto_map_of
from secateur.types import Cut, DependencyGraph, Kept

_SIZES = {"hidden": "hidden_size", "vocab": "vocab_size"}
"""Kinds of groups that slicing describes in the config, and the size's name there."""
NOT_BUILT = (AssertionError, AttributeError, RuntimeError, StrictDataclassError, TypeError, ValueError)
"""Errors of families for sizes that they do not support."""


def listed_config(
    model: PreTrainedModel, family: type[PreTrainedModel], graph: DependencyGraph, kept: Kept
) -> PreTrainedConfig:
    """The config for ``pruned_class(family)`` that lists how ``model`` differs from what the family would build.

    Args:
        model: sliced, perhaps without weights; its config is as slicing left it.
        graph, kept: of the model before the cut.

    Raises ModelError for a family that transformers does not contain, and when the family's code cannot build a model
    of which this one is a part.
    """
    if not family.__module__.startswith("transformers."):
        raise ModelError(
            f"{family.__name__} has its own modelling code, and its new sizes cannot be described. Prune all layers to "
            "the same sizes, or use a family that transformers contains."
        )
    config = without_layer_sizes(model.config)
    earlier = (getattr(model.config, "pruned_layers", None) or {}).get("built_with", {})
    before = _sizes_before(config, graph, kept)
    for built_with in (earlier, before | earlier) if before.keys() - earlier.keys() else (earlier,):
        found = _listed(model, family, config, built_with)
        if found is not None:
            config.pruned_layers = found
            config.auto_map = auto_map_of(family)
            return config
    raise ModelError(
        f"The cut {config.model_type} model cannot be described by a config: {family.__name__} builds no larger model "
        "that contains it. Slice the model with this graph and these units, and merge its adapters first."
    )


def changed_scales(model: nn.Module, built: nn.Module) -> list[str]:
    """Fractional attributes of modules that differ in ``built``: scales computed from a size."""
    here = settings_of(model)
    return [
        name
        for name, value in settings_of(built).items()
        if isinstance(value, float) and here.get(name, value) != value
    ]


def _sizes_before(config: PreTrainedConfig, graph: DependencyGraph, kept: Kept) -> dict[str, int]:
    """Path in the config → the size before the cut, for sizes that slicing has changed."""
    changed = {}
    for group, _ in Cut.keeping(graph, kept).groups:
        for part, own in _parts(config):
            name = own.attribute_map.get(_SIZES.get(group.kind, ""), _SIZES.get(group.kind, ""))
            if name and vars(own).get(name) == len(kept[group.name]):
                changed[f"{part}{name}"] = group.size
    return changed


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The config and that of its generating part, with the prefixes of their paths."""
    yield "", config
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            yield f"{name}.", text


def _listed(
    model: PreTrainedModel, family: type[PreTrainedModel], config: PreTrainedConfig, built_with: Mapping[str, int]
) -> dict[str, Any] | None:
    """The entry ``pruned_layers``; None when the family builds no larger model, or one with other scales."""
    whole = copy.deepcopy(config)
    for path, value in built_with.items():
        part, _, name = path.rpartition(".")
        setattr(getattr(whole, part) if part else whole, name, value)
    try:
        with torch.device("meta"):
            built = family(whole)
    except NOT_BUILT:
        return None
    there, here = built.state_dict(), model.state_dict()
    tensors = {name: list(here[name].shape) for name in here if name not in there or _differs(here[name], there[name])}
    smaller = all(_fits(shape, there.get(name)) for name, shape in tensors.items())
    if there.keys() - here.keys() or not smaller or changed_scales(model, built):
        return None
    return {"tensors": tensors, "numbers": _numbers(model, built), "built_with": dict(built_with)}


def _differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape


def _fits(shape: Sequence[int], whole: torch.Tensor | None) -> bool:
    """Whether a tensor of ``shape`` is a part of ``whole``; a new one must be a bias."""
    if whole is None:
        return len(shape) == 1
    return len(shape) == whole.dim() and all(one <= two for one, two in zip(shape, whole.shape, strict=True))


def _numbers(model: nn.Module, built: nn.Module) -> dict[str, int | float]:
    """Path → value of the numbers that modules, or their own configs, keep about themselves and that differ."""
    there, here = settings_of(built), settings_of(model)
    names = (name for name in there if _is_number(there[name]) and _is_number(here.get(name)))
    numbers = {name.removeprefix("."): here[name] for name in names if here[name] != there[name]}
    modules = dict(built.named_modules())
    for path, module in model.named_modules():
        own, other = (vars(each).get("config") for each in (module, modules.get(path, module)))
        for name in _read_from_configs(own, other):
            numbers[f"{path}.config.{name}"] = getattr(own, name)
    return numbers


def _read_from_configs(own: Any, other: Any) -> Iterable[str]:
    """Sizes of attention that code reads from the config of its module, where two of these differ in them."""
    names = {pattern.name for pattern in PATTERNS if pattern.in_config}
    return sorted(name for name in names & vars(own or object).keys() if vars(own)[name] != vars(other).get(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

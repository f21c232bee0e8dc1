"""The config of a model whose layers have different sizes.

Sizes of layers are in transformers' own ``per_layer_config``. ``pruned_layers`` lists the attributes that follow them,
and ``auto_map`` names the class in the modelling file (``surgery/rebuild.py``) that uses both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from secateur.errors import ModelError
from secateur.export.layers import LayerSizes, without_layer_sizes
from secateur.surgery.attributes import attribute_changes
from secateur.surgery.rebuild import OWN_NAME, auto_map_of
from secateur.types import NodeGroup


def uneven_config(family: type[PreTrainedModel], sizes: LayerSizes, before: PreTrainedModel) -> PreTrainedConfig:
    """The config for ``pruned_class(family)`` with layers of these sizes.

    ``before``, which may be without weights, is the model before the cut. Raises ModelError for a family that
    transformers does not contain, because its code would have to be copied.
    """
    if not family.__module__.startswith("transformers."):
        raise ModelError(
            f"{family.__name__} has its own modelling code, and layers of different sizes cannot be described. Prune "
            "all layers to the same sizes, or use a family that transformers contains."
        )
    config = copy.deepcopy(sizes.whole)
    names = {name: _writable(config, name) for own in sizes.sizes.values() for name in own}
    known = (getattr(before.config, "pruned_layers", None) or {}).get("follows", {})
    follows: dict[str, dict[str, int | float]] = {}
    path = ""
    for place, name in sizes.names.items():
        path = place.path
        follows[names[name]] = known.get(names[name]) or dict(sorted(place.rows)) | _attributes(
            before, sizes, sizes.cut_now[name], path
        )
    layers = cast(nn.ModuleList, before.get_submodule(path))
    if len(layers) != config.num_hidden_layers:
        raise ModelError(
            f"{path} of this {config.model_type} model has {len(layers)} layers and its config has "
            f"{config.num_hidden_layers}, therefore sizes of layers cannot be described. Prune all layers to the same "
            "sizes."
        )
    config.pruned_layers = {"path": path, "follows": follows}
    config.auto_map = auto_map_of(family)
    per_layer: dict[int | str, dict[str, Any]] = {}
    for layer, own in sizes.sizes.items():
        per_layer[layer] = {names[name]: size for name, size in own.items()}
    config.per_layer_config = per_layer
    return config


def added_biases(config: PreTrainedConfig, unknown: Iterable[str]) -> list[str]:
    """Linears of a layer whose biases are among the ``unknown`` parameters, as paths in the layer."""
    inside = re.compile(rf"{re.escape(config.pruned_layers['path'])}\.\d+\.(.+)\.bias")
    return sorted({match[1] for name in unknown if (match := inside.fullmatch(name))})


def _writable(config: PreTrainedConfig, name: str) -> str:
    """``name``, or one of our names for a size that must not differ between layers for the family's validator.

    Llama's divides the hidden size by the number of heads, and fails when there are several. Our name works as well:
    ``pruned_layers`` refers to it.
    """
    trial = without_layer_sizes(config).to_dict()
    trial["per_layer_config"] = {0: {name: trial[name] + 1}}
    try:
        type(config).from_dict(trial)
    except AmbiguousGlobalPerLayerAttributeError:
        setattr(config, OWN_NAME + name, getattr(config, name))
        return OWN_NAME + name
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error)
        raise ModelError(f"The config of {config.model_type} models refuses the kept sizes: {reason}") from error
    return name


def _attributes(before: PreTrainedModel, sizes: LayerSizes, group: NodeGroup, path: str) -> dict[str, int | float]:
    """``"path inside the layer.attribute"`` → its decrease with each unit of ``group``, where that is not 0.

    It is a fraction for an attribute that falls by 1 when all runs of the group lose a unit (query heads of a KV head).
    """
    prefix = f"{path}.{group.layer}."
    paths = {id(module): name.removeprefix(prefix) for name, module in before.named_modules()}
    attributes: dict[str, int | float] = {}
    length = group.size // group.runs
    kept = [unit for unit in range(group.size) if unit % length < length - 1]  # without the last of each run
    for change in attribute_changes(before, sizes.graph, {group.name: kept}):
        holder = change.module.config if change.in_config else change.module
        path = paths[id(change.module)] + (".config" if change.in_config else "")
        if change.value != getattr(holder, change.name):
            loss = getattr(holder, change.name) - change.value
            attributes[f"{path}.{change.name}"] = loss / group.runs if loss % group.runs else loss // group.runs
    return attributes

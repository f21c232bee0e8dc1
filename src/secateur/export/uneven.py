"""The config of a model whose layers have different sizes.

Sizes of layers go to transformers' own ``per_layer_config``; ``pruned_layers`` says what follows them, and
``auto_map`` names the class in the modelling file (``surgery/rebuild.py``) that obeys both.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from secateur.errors import ModelError
from secateur.export.layers import LayerSizes
from secateur.surgery.attributes import attribute_changes
from secateur.surgery.rebuild import MODELING_FILE
from secateur.types import NodeGroup


def uneven_config(family: type[PreTrainedModel], sizes: LayerSizes, before: PreTrainedModel) -> PreTrainedConfig:
    """The config for ``pruned_class(family)`` with layers of these sizes.

    ``before``, which may be without weights, is the model before the cut. Raises ModelError for a family that
    transformers does not contain: its own code would have to travel along.
    """
    if not family.__module__.startswith("transformers."):
        raise ModelError(
            f"{family.__name__} comes with its own code, beside which layers of different sizes cannot be described. "
            "Prune all layers to the same sizes, or use a family that transformers contains."
        )
    follows = dict((getattr(before.config, "pruned_layers", None) or {}).get("follows", {}))
    path = ""
    for place, name in sizes.names.items():
        path = place.path
        if name not in follows:
            follows[name] = dict(sorted(place.rows)) | _attributes(before, sizes, sizes.cut_now[name], path)
    config = copy.deepcopy(sizes.whole)
    config.pruned_layers = {"path": path, "follows": follows}
    module = MODELING_FILE.removesuffix(".py")
    config.auto_map = {"AutoModelForCausalLM": f"{module}.Pruned{family.__name__}"}
    per_layer: dict[int | str, dict[str, Any]] = {layer: dict(own) for layer, own in sizes.sizes.items()}
    config.per_layer_config = per_layer
    try:
        type(config).from_dict(config.to_dict())
    except AmbiguousGlobalPerLayerAttributeError:
        # The family's validator (Llama's, of the heads) wants the global size although layers differ from it.
        config.allow_global_per_layer_attribute_access = True
    return config


def _attributes(before: PreTrainedModel, sizes: LayerSizes, group: NodeGroup, path: str) -> dict[str, int]:
    """``"path inside the layer.attribute"`` → how much it loses with each unit of ``group``, where that is not 0."""
    prefix = f"{path}.{group.layer}."
    paths = {id(module): name.removeprefix(prefix) for name, module in before.named_modules()}
    attributes = {}
    for change in attribute_changes(before, sizes.graph, {group.name: range(group.size - 1)}):
        name = f"{paths[id(change.module)]}."
        if change.in_config:
            attributes[f"{name}config"] = 1  # any number: the module gets the layer's own config
        elif change.value != getattr(change.module, change.name):
            attributes[name + change.name] = getattr(change.module, change.name) - change.value
    return attributes

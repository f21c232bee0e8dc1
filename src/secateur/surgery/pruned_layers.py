"""How a model with layers of different sizes builds itself: one source, for us and for the folders that we save.

``rebuild`` copies the text of :class:`PrunedLayers` into ``modeling_pruned.py``; it uses the imports below and no more.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


class PrunedLayers:
    """Makes the layers of a model as small as ``config.json`` says, each in its own way.

    ``per_layer_config`` holds the sizes of each layer; what it does not name has the global size, from before pruning.
    ``pruned_layers`` says where the layers are (``path``) and what in a layer follows which size (``follows``):
    ``"mlp.down_proj.weight:1": 1`` is axis 1 of that weight, which is 1 shorter for each unit that the layer lacks;
    a name without an axis is a number that a module, or the config of a module, keeps about itself. ``biases`` names
    linears of a layer that have a bias here and none in the family.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        sizes = config.to_dict()["per_layer_config"]
        config.per_layer_config = None  # The family's own code builds all layers in the global sizes ...
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        whole = copy.copy(config)
        config.per_layer_config = sizes  # ... and what a layer lacks is taken off, before any weight is loaded.
        layers = self.get_submodule(config.pruned_layers["path"])  # type: ignore[attr-defined]
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            for size, followers in config.pruned_layers["follows"].items():
                lacking = getattr(whole, size) - getattr(own, size)
                for follower, per_unit in followers.items() if lacking else ():
                    self._shrink(layer, follower, round(lacking * per_unit))
            for path in config.pruned_layers.get("biases", ()):
                linear = layer.get_submodule(path)
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
        for module in self.modules():  # type: ignore[attr-defined]
            if "Rotary" in type(module).__name__:
                module.config = whole  # It serves all layers, and needs no more than the width of a head.

    def _shrink(self, layer: Any, follower: str, amount: int) -> None:
        name, _, axis = follower.partition(":")
        path, _, attribute = name.rpartition(".")
        try:
            owner = layer.get_submodule(path.removesuffix(".config"))
            if path.endswith(".config"):  # All modules share the config; this one needs its own.
                owner.config = copy.copy(owner.config)
                owner = owner.config
                owner.per_layer_config = None
            value = getattr(owner, attribute)
        except AttributeError:
            return  # A layer of another kind, such as a dense one among mixtures of experts, does not have it.
        if not axis:
            setattr(owner, attribute, value - amount)
        elif value is not None:
            smaller = value.detach().narrow(int(axis), 0, value.shape[int(axis)] - amount).clone()
            setattr(owner, attribute, nn.Parameter(smaller) if isinstance(value, nn.Parameter) else smaller)
            self._refresh(owner)

    def _refresh(self, module: Any) -> None:
        """Let a layer of torch know the new shape of its weight."""
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Conv1d):
            module.in_channels = module.out_channels = module.groups = module.weight.shape[0]
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(module.weight.shape)

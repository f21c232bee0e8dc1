"""How a model with layers of different sizes builds itself: one source, for us and for the folders that we save.

``rebuild`` copies the text of :class:`PrunedLayers` into ``modeling_pruned.py``; it uses the imports below and no more.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


class PrunedLayers:
    """Makes a model as small as ``config.json`` says before any weight is loaded, in one of two ways.

    *By layer*: ``per_layer_config`` holds the sizes of each layer; what it does not name has the global size, from
    before pruning. ``pruned_layers`` says where the layers are (``path``) and what in a layer follows which size
    (``follows``): ``"mlp.down_proj.weight:1": 1`` is axis 1 of that weight, which is 1 shorter for each unit that the
    layer lacks; a name without an axis is a number that a module, or the config of a module, keeps about itself.
    ``biases`` names linears of a layer that have a bias here and none in the family.

    *By tensor*: ``pruned_layers`` holds shapes of tensors (``tensors``) and numbers that modules keep (``numbers``),
    each by its path, where the family's code would make others from this config with the sizes in ``built_with``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if "tensors" in config.pruned_layers:
            self._by_tensor(config, *args, **kwargs)
        else:
            self._by_layer(config, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """What initialises is the family's own code, which leaves loaded weights alone and fills the other buffers."""
        return False

    def _by_layer(self, config: Any, *args: Any, **kwargs: Any) -> None:
        sizes = config.to_dict()["per_layer_config"]
        config.per_layer_config = None  # The family's own code builds all layers in the global sizes ...
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        whole = copy.copy(config)
        config.per_layer_config = sizes  # ... and what a layer lacks is taken off, before any weight is loaded.
        self.config.per_layer_config = sizes  # type: ignore[attr-defined]  # Some families make themselves a copy.
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

    def _by_tensor(self, config: Any, *args: Any, **kwargs: Any) -> None:
        pruned, whole = config.pruned_layers, copy.deepcopy(config)
        for name, value in pruned["built_with"].items():
            part, _, size = name.rpartition(".")
            setattr(getattr(whole, part) if part else whole, size, value)
        super().__init__(whole, *args, **kwargs)  # type: ignore[call-arg]
        for name, shape in pruned["tensors"].items():
            path, _, attribute = name.rpartition(".")
            owner = self.get_submodule(path)  # type: ignore[attr-defined]
            if getattr(owner, attribute) is None:  # A bias that the family does not have.
                setattr(owner, attribute, nn.Parameter(owner.weight.new_zeros(shape)))
            for axis, size in enumerate(shape):
                self._shrink(self, f"{name}:{axis}", getattr(owner, attribute).shape[axis] - size)
        for name, value in pruned["numbers"].items():
            path, _, attribute = name.rpartition(".")
            setattr(self._owner(self, path), attribute, value)
        for module in self.modules():  # type: ignore[attr-defined]
            for name, value in pruned["built_with"].items() if "config" in vars(module) else ():
                part, _, size = name.rpartition(".")
                own = getattr(config, part) if part else config
                if type(module.config) is type(own) and getattr(module.config, size) == value:
                    setattr(module.config, size, getattr(own, size))  # What is read later on is what is there.

    def _shrink(self, layer: Any, follower: str, amount: int) -> None:
        name, _, axis = follower.partition(":")
        path, _, attribute = name.rpartition(".")
        try:
            owner = self._owner(layer, path)
            value = getattr(owner, attribute)
        except AttributeError:
            return  # A layer of another kind, such as a dense one among mixtures of experts, does not have it.
        if not axis:
            setattr(owner, attribute, value - amount)
        elif value is not None:
            smaller = value.detach().narrow(int(axis), 0, value.shape[int(axis)] - amount).clone()
            setattr(owner, attribute, nn.Parameter(smaller) if isinstance(value, nn.Parameter) else smaller)
            self._refresh(owner)

    def _owner(self, layer: Any, path: str) -> Any:
        """The module at ``path``, or its config: that is shared by all modules, and this one needs its own."""
        owner = layer.get_submodule(path.removesuffix(".config"))
        if not path.endswith(".config"):
            return owner
        owner.config = copy.copy(owner.config)
        owner.config.per_layer_config = None
        return owner.config

    def _refresh(self, module: Any) -> None:
        """Let a layer of torch know the new shape of its weight."""
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Conv1d):
            module.in_channels = module.out_channels = module.groups = module.weight.shape[0]
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(module.weight.shape)

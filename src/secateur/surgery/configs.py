"""Changes of a model's config when layers, the hidden width or the vocabulary are cut.

Sizes inside of one layer are described by ``export`` after the cut. The model's code reads these three while it runs
(the mask of a layer, the width of embeddings). Therefore the config changes with them, and it is checked that it still
builds the kept layers with the same settings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.surgery.blocks import LAYER_COUNTS, OWN_INDEX
from secateur.types import Cut, DependencyGraph, Kept, NodeGroup

_INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "full_attention_layers")
"""Names of lists of layers' indices."""
_FROM_THE_BEGINNING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Names that hold how many layers from the beginning are of one kind."""
_FROM_THE_END = ("num_kv_shared_layers",)
"""Names that hold how many layers at the end are of one kind."""
SPECIAL_TOKENS = tuple(
    f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")
)
"""Names that hold ids of tokens."""

Configs = Mapping[nn.Module, PreTrainedConfig]


def changed_configs(model: nn.Module, graph: DependencyGraph, kept: Kept) -> Configs:
    """Module → its config after a cut of ``model`` to ``kept``; empty when no config changes.

    Raises ModelError when the new config would build kept layers with other settings: in families that compute the kind
    of a layer from its index.
    """
    cuts = [group for group, _ in Cut.keeping(graph, kept).groups if group.kind in _CHANGES]
    own = {m: config for m in model.modules() if isinstance(config := vars(m).get("config"), PreTrainedConfig)}
    if not cuts or not own:
        return {}
    base = next(module for module in own if isinstance(module, PreTrainedModel))
    for group in cuts:
        if group.modules:  # alone: changes of the others must not count against it
            built = _built(base, _changed(model, own, [group], kept)[base])
            _check_layers(model, group, kept[group.name], built, base)
    return _changed(model, own, cuts, kept)


def _changed(model: nn.Module, own: Configs, cuts: Sequence[NodeGroup], kept: Kept) -> Configs:
    """Copies of the configs, shared as before, that describe the model after ``cuts``."""
    memo: dict[int, Any] = {}
    configs = {module: copy.deepcopy(config, memo) for module, config in own.items()}
    paths = {module: path for path, module in model.named_modules()}
    for group in cuts:
        every: dict[int, PreTrainedConfig] = {}
        for module, config in configs.items():
            if _holds(paths[module], group):  # a part that sees images may have the same sizes, and keeps them
                text = config.get_text_config(decoder=True)
                every |= {id(config): config, id(text): text}
        for config in every.values():
            _CHANGES[group.kind](config, list(kept[group.name]), group.size)
    return configs


def _holds(path: str, group: NodeGroup) -> bool:
    """Whether the module at ``path`` has something of ``group`` in it, or is in one of its layers."""
    inside = (*group.modules, *(member.parameter for member in group.members))
    return any(f"{name}.".startswith(f"{path}." if path else "") for name in inside) or any(
        path.startswith(f"{layer}.") for layer in group.modules
    )


def _built(base: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the class of ``base``, without weights."""
    try:
        with torch.device("meta"):
            return type(base)(copy.deepcopy(config))
    except Exception as error:  # whatever a family's validators and constructors raise
        raise ModelError(f"No {type(base).__name__} can be built after this cut: {error}") from error


def _shorten(config: PreTrainedConfig, kept: list[int], size: int) -> None:
    """Describe the layers ``kept`` of ``size``."""
    counts = {config.attribute_map.get(name, name) for name in LAYER_COUNTS} & vars(config).keys()
    values: dict[str, Any] = {name: len(kept) for name in counts if vars(config)[name] == size}
    if not values:
        return
    if "num_hidden_layers" in counts - values.keys() and config.num_hidden_layers % size == 0:
        values["num_hidden_layers"] = config.num_hidden_layers // size * len(kept)  # of several in one block
    numbers = {old: new for new, old in enumerate(kept)}
    sizes = config.to_dict().get("per_layer_config")
    if sizes is not None:
        config.per_layer_config = None
    for name, value in vars(config).items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in _INDEX_LISTS and isinstance(value, list):
            values[name] = [numbers[old] for old in value if old in numbers]
        elif isinstance(value, list | tuple) and len(value) == size and _is_per_layer(name, value):
            values[name] = type(value)(value[old] for old in kept)
        elif number and name in _FROM_THE_BEGINNING:
            values[name] = sum(old < value for old in kept) if value < size else value
        elif number and name in _FROM_THE_END:
            values[name] = sum(old >= size - value for old in kept)
    vars(config).update(values)  # all at once: validators compare them with each other
    if sizes is not None:
        config.per_layer_config = {numbers[int(old)]: own for old, own in sizes.items() if int(old) in numbers}


def _is_per_layer(name: str, value: Sequence[Any]) -> bool:
    """Whether a list as long as there are layers has an entry for each: by its name, or because they are words."""
    if name.endswith(("token_id", "token_ids")) or name == "architectures":
        return False
    return "layer" in name or all(isinstance(item, str | bool) for item in value)


def _narrow(config: PreTrainedConfig, kept: list[int], size: int) -> None:
    """Describe a residual stream of ``len(kept)`` instead of ``size``; heads stay as wide as they are."""
    if getattr(config, "hidden_size", None) != size:
        return
    heads = vars(config).get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    unset = not computed and vars(config).get("head_dim") is None
    if unset and isinstance(heads, int) and heads:
        config.head_dim = size // heads
    vars(config)[config.attribute_map.get("hidden_size", "hidden_size")] = len(kept)


def _renumber(config: PreTrainedConfig, kept: list[int], size: int) -> None:
    """Describe a vocabulary of the tokens ``kept``, in which every token has a new id."""
    if getattr(config, "vocab_size", None) == size:
        vars(config)[config.attribute_map.get("vocab_size", "vocab_size")] = len(kept)
    renumber_special_tokens(config, kept)


_CHANGES = {"layer": _shorten, "hidden": _narrow, "vocab": _renumber}


def renumber_special_tokens(config: Any, kept: Sequence[int]) -> None:
    """Give the ids of special tokens in a config, or a generation config, their new numbers."""
    numbers = {old: new for new, old in enumerate(kept)}
    for name in SPECIAL_TOKENS:
        value = vars(config).get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            vars(config)[name] = numbers.get(value)
        elif isinstance(value, list | tuple):
            vars(config)[name] = [numbers[old] for old in value if old in numbers]


# --- does it still build what is there? -----------------------------------------------------------------------------


def _check_layers(
    model: nn.Module, group: NodeGroup, kept: Sequence[int], built: PreTrainedModel, base: PreTrainedModel
) -> None:
    """Raise ModelError unless the layers of ``built`` have the settings of those of ``model`` that stay."""
    prefix = next(f"{path}." if path else "" for path, module in model.named_modules() if module is base)
    for new, old in enumerate(kept):
        path = group.modules[old]
        there = built.get_submodule(f"{path.removeprefix(prefix).rpartition('.')[0]}.{new}")
        here = settings_of(model.get_submodule(path))
        for name, value in settings_of(there).items():
            known = here.get(name, None if name.endswith(":") else value)
            if known != value:
                raise ModelError(
                    f"Without the removed layers, the config of this {base.config.model_type} model would build layer "
                    f"{old} in another way ({name.strip('.:') or 'it'} is {value!r} instead of {known!r}), because it "
                    "computes from a layer's index what the layer is. Remove layers in whole periods of that pattern, "
                    "or none."
                )


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """Class and plain attributes of a module and of every module in it, without a layer's index."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        path = ".".join(part for part in name.split(".") if part != "base_layer")
        found[f"{path}:"] = type(module).__name__
        for attribute, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str) and not attribute.startswith("_")
            if plain and attribute not in (*OWN_INDEX, "training"):
                found[f"{path}.{attribute}"] = value
    return found

"""Checks that the weight files and the architecture have the same tensors, before the weights are read.

transformers ignores tensors without a place, and draws random numbers for missing ones, for some families without a
message. Here the names in the files are compared with those of the model without weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from secateur.errors import ModelError
from secateur.loading.library import explained
from secateur.loading.weights import FLOATS, Stored, same_numbers

_COMPUTED = re.compile(
    r"(^|[._])(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|causal_mask|masked_bias|"
    r"relative_position_index|num_batches_tracked)$"
)
"""Buffers that older versions of transformers saved, and newer ones compute."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""A causal mask by the name of a bias, as GPT-2 and GPT-NeoX saved it; it has four axes."""
_PREDICT_MORE = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
"""Names in configs for the number of layers for multi-token prediction, which no causal language model here has."""


@dataclass
class Fit:
    """The places of the files' tensors in the model."""

    plain: dict[str, list[str]] = field(default_factory=dict)
    """Tensor of the model → tensors of the files that are read into it unchanged."""
    merged: dict[str, list[str]] = field(default_factory=dict)
    """The same for tensors that are joined or split while they are read."""
    unplaced: list[str] = field(default_factory=list)
    """Tensors of the files without a place, except buffers that the model computes itself."""


def fit(model: PreTrainedModel, stored: Mapping[str, Stored]) -> Fit:
    """The place of each stored tensor in ``model``, which may be without weights."""
    transforms = get_model_conversion_mapping(model)
    renamings = [change for change in transforms if isinstance(change, WeightRenaming)]
    converters = [change for change in transforms if isinstance(change, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    computed = {name for name, _ in model.named_buffers()} - state.keys()
    found = Fit()
    for key, tensor in stored.items():
        place, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if place not in state and key in state:
            place, pattern = rename_source_key(key, [], [], prefix, state)
        if place in state:
            (found.plain if pattern is None else found.merged).setdefault(place, []).append(key)
        elif place not in computed and not _is_computed(key, tensor):
            found.unplaced.append(key)
    return found


def _is_computed(key: str, tensor: Stored) -> bool:
    return bool(_COMPUTED.search(key) or (_MASK.search(key) and len(tensor.shape) == 4))


def contradicted_ties(model: PreTrainedModel, stored: Mapping[str, Stored], found: Fit) -> list[tuple[str, str]]:
    """Pairs of stored tensors that are tied in the config, but have different values."""
    pairs = []
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        keys = [found.plain[name][0] for name in (one, other) if name in found.plain]
        if len(keys) == 2 and not same_numbers(stored[keys[0]], keys[0], stored[keys[1]], keys[1]):
            pairs.append((keys[0], keys[1]))
    return pairs


def check_types(model: PreTrainedModel, stored: Mapping[str, Stored], found: Fit) -> None:
    """Raise ModelError for a weight that is not stored in a floating-point type of 16 bits or more."""
    state = model.state_dict()
    for place, keys in (found.plain | found.merged).items():
        for key in keys:
            if state[place].is_floating_point() and not stored[key].is_float:
                raise ModelError(
                    f"{stored[key].file} holds the weight {key} as {stored[key].dtype}; weights are read as "
                    f"{', '.join(FLOATS)}. If the model is quantised, give the unquantised one. Otherwise save it "
                    "again."
                )


def check_places(model: PreTrainedModel, stored: Mapping[str, Stored], found: Fit, name: str) -> None:
    """Raise ModelError when two tensors claim one place, or a parameter has none or one of another shape."""
    for place, keys in found.plain.items():
        if len(keys) > 1 or place in found.merged:
            both = [*keys, *found.merged.get(place, [])][:2]
            raise ModelError(
                f"{name} holds two tensors for {place}: {both[0]} and {both[1]}. It is not clear which one to use. "
                "Save the model again."
            )
    with explained(f"The weights of {name} do not fit its config.json", name):
        wrong = _misfits(model, stored)
    refuse_misfits(wrong, name)


def _misfits(model: PreTrainedModel, stored: Mapping[str, Stored]) -> list[str]:
    """The parameters that ``model`` would lack, found by loading tensors of the same shapes without values.

    transformers itself joins and splits tensors that are stored in another form, such as one tensor for each expert.
    """
    empty = copy.deepcopy(model)
    transforms: list[Any] = [*get_model_conversion_mapping(empty)]
    for change in transforms:
        if isinstance(change, WeightConverter):
            change.force_cpu = False  # set for tensors that are too large for a GPU
    options = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=transforms)
    tensors = {key: torch.empty(tensor.shape, device="meta") for key, tensor in stored.items()}
    info, _ = convert_and_load_state_dict_in_model(empty, tensors, options)
    shapes = [f"{place}: {list(given)} instead of {list(wanted)}" for place, given, wanted in info.mismatched_keys]
    lacking = _without_tensor(model, model.state_dict().keys() - info.missing_keys)
    empty._adjust_missing_and_unexpected_keys(info)  # a family knows which buffers it computes
    return sorted(shapes) + sorted(lacking | (info.missing_keys & {buffer for buffer, _ in model.named_buffers()}))


def refuse_misfits(wrong: list[str], name: str) -> None:
    """Raise ModelError when ``wrong`` names parameters without fitting weights in the files."""
    if wrong:  # transformers would use random numbers in their place
        raise ModelError(
            f"{name} has no fitting weights for {len(wrong)} parameters of its config.json; the first is {wrong[0]}."
        )


def _without_tensor(model: PreTrainedModel, given: Set[str]) -> set[str]:
    """Parameters that are ``given`` under none of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    ties = getattr(model, "all_tied_weights_keys", {})
    given = given | {ties[name] for name in given if name in ties}
    given |= {one for one, other in ties.items() if other in given}
    return {alike[0] for alike in names.values() if not given & set(alike)}


def leave_out(unplaced: list[str], config: PreTrainedConfig, name: str, drop: bool) -> str:
    """The message for tensors without a place; raises ModelError unless ``drop`` is set."""
    shown = ", ".join(unplaced[:6]) + (" ..." if len(unplaced) > 6 else "")
    if drop:
        return f"Leaving out {len(unplaced)} tensors of {name} that have no place in its architecture: {shown}"
    raise ModelError(
        f"{name} holds {len(unplaced)} tensors that have no place in the architecture of its config.json "
        f"({config.model_type}): {shown}. A saved model would lack them. If they may be dropped (layers for "
        "multi-token prediction, a vision tower), add --set model.drop_unexpected=true (drop_unexpected=True). "
        "Otherwise correct config.json."
    )


def promise_nothing_absent(model: PreTrainedModel) -> None:
    """Remove layers for multi-token prediction from the config of ``model`` when the model has none."""
    if any(re.search(r"(^|[._])(mtp|nextn)", name) for name in model.state_dict()):
        return
    for part in (model.config, model.config.get_text_config()):
        for key in _PREDICT_MORE:
            if getattr(part, key, None):
                setattr(part, key, 0)
        nested = getattr(part, "mtp_config", None)
        if isinstance(nested, dict):
            part.mtp_config = {key: 0 if key in _PREDICT_MORE else value for key, value in nested.items()}


def check_layers(config: PreTrainedConfig, tensors: int, name: str) -> None:
    """Raise ModelError for more layers than the ``tensors`` in the files: building them could take hours."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise ModelError(
            f"config.json of {name} speaks of {layers:,} layers; its files hold {tensors} tensors. Correct "
            "config.json, or download the model again."
        )

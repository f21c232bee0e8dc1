"""Pads a model whose layers differ in size with zeros to equal sizes: a plain checkpoint for every loader.

It is the reverse of slicing. A plan that keeps the first units of each group turns the even model into the uneven one.
The units that this plan would remove are zero, therefore both compute the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError, SecateurError
from secateur.export.huggingface import on_meta, shapes_of
from secateur.export.layers import LayerSizes
from secateur.export.sizes import query_heads_name, size_place_of
from secateur.graph import trace
from secateur.surgery import slice_model
from secateur.surgery.rebuild import OWN_NAME, family_of, is_listed, is_uneven
from secateur.surgery.rows import removed_rows
from secateur.types import DependencyGraph, Kept, NodeGroup
from secateur.units import Rows

_BIASES = ("attention_bias", "mlp_bias")
"""Switches of families that can have biases. Methods that compensate for removed units (FLAP) add some."""


def uniform_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same function and a plain config of its family, in the type of ``model``.

    Every size becomes that of the largest layer, or the next larger one that the family supports. ``model``, which has
    sizes of layers in its config, is not changed.

    Raises ModelError for a model that is already even, and where padding with zeros would not be exact: for experts (a
    router chooses among them), for units that a norm runs over, and for models whose config lists tensors.
    """
    if not is_uneven(model.config):
        raise ModelError(
            "All layers of this model have the same sizes already. Every program that supports its family opens it as "
            "it is."
        )
    if is_listed(model.config):
        raise ModelError(
            f"The cut of this {model.config.model_type} model is not described by sizes of layers, therefore it cannot "
            "be padded. Prune it with --runs-on everywhere instead."
        )
    family, sizes = family_of(model), LayerSizes(model.config, trace(model), {})
    for config in _even_configs(sizes):
        even = on_meta(family, config)
        graph = trace(even)
        kept = _first_units(graph, sizes)
        if _holds(even, graph, kept, model):
            _refuse_inexact(graph, kept)
            return _filled(model, even, removed_rows(even, graph, kept))
    raise ModelError(
        f"No plain config of {model.config.model_type} describes this model after padding. Prune it with --runs-on "
        "everywhere instead."
    )


def _even_configs(sizes: LayerSizes) -> Iterator[PreTrainedConfig]:
    """Plain configs that are large enough: without biases first, then with biases if the family supports them."""
    even = copy.deepcopy(sizes.whole)
    for name in dict.fromkeys(sizes.names.values()):
        _fill_up(even, name, sizes)
    for name in [name for name in vars(even) if name.startswith(OWN_NAME)]:
        delattr(even, name)  # the family computes this size: it is the one from before pruning
    yield even
    for name in _BIASES:
        if getattr(even, name, None) is False:
            even = copy.deepcopy(even)
            setattr(even, name, True)
            yield even


def _fill_up(even: PreTrainedConfig, name: str, sizes: LayerSizes) -> None:
    """Set one size of ``even`` to the smallest that its family supports and that fits every layer."""
    whole, query = getattr(sizes.whole, name), query_heads_name(sizes.whole, name)
    if name.startswith(OWN_NAME):
        return
    layers = range(sizes.whole.num_hidden_layers)
    least = max(sizes.of(layer, name) for layer in layers)
    each = max(sizes.of(layer, query) // sizes.of(layer, name) for layer in layers) if query is not None else 1
    for size in range(least, whole + 1):
        setattr(even, name, size)
        if query is not None:
            setattr(even, query, size * each)
        try:
            type(even).from_dict(even.to_dict())
        except (StrictDataclassError, ValueError):  # Llama's requires hidden size / heads to be whole
            continue
        return
    raise ModelError(
        f"The config of {even.model_type} supports no {name} from {least} to {whole}. Prune the model with --runs-on "
        "everywhere instead."
    )


def _first_units(graph: DependencyGraph, sizes: LayerSizes) -> dict[str, list[int]]:
    """The units of the even model's ``graph`` for those of the uneven one: the first ones of every run."""
    kept: dict[str, list[int]] = {}
    for group in graph:
        name = _name_of(group, sizes)
        if name is None or group.layer is None or group.within in kept:
            continue  # query heads follow their KV head
        length, each = group.size // group.runs, sizes.of(group.layer, name) // group.runs
        if each < length:
            kept[group.name] = [run * length + unit for run in range(group.runs) for unit in range(each)]
    return kept


def _name_of(group: NodeGroup, sizes: LayerSizes) -> str | None:
    """The name of the size of ``group``, which may have more biases than in the uneven model."""
    place = size_place_of(group) if group.members else None
    if place is None:
        return None
    return next((n for known, n in sizes.names.items() if known.path == place.path and known.rows <= place.rows), None)


def _holds(even: PreTrainedModel, graph: DependencyGraph, kept: Kept, model: PreTrainedModel) -> bool:
    """Whether a cut of ``even`` to ``kept`` gives the shapes of ``model``; ``even`` may have more biases."""
    sliced = copy.deepcopy(even)
    try:
        slice_model(sliced, graph, kept)
    except SecateurError:
        return False
    left, wanted = shapes_of(sliced), shapes_of(model)
    more = left.keys() - wanted.keys()
    return all(left.get(name) == shape for name, shape in wanted.items()) and all(n.endswith(".bias") for n in more)


def _refuse_inexact(graph: DependencyGraph, kept: Kept) -> None:
    """Raise ModelError when padding a group with zeros would change the function."""
    for name in kept:
        group = graph[name]
        if group.renormalised or not any(member.role == "in" for member in group.members):
            why = f"{', '.join(group.renormalised)} counts its units" if group.renormalised else "nothing consumes it"
            raise ModelError(
                f"Padding {name} with zeros would change the model: {why}. Prune it with --runs-on everywhere, or with "
                "--set budget.ranking=layer."
            )


def _filled(model: PreTrainedModel, even: PreTrainedModel, lacking: Sequence[Rows]) -> PreTrainedModel:
    """``even``, which has no weights yet, with those of ``model``, and zeros in ``lacking``."""
    rows: dict[int, list[Rows]] = {}
    for one in lacking:
        rows.setdefault(id(one.tensor), []).append(one)
    own = model.state_dict()
    weights = {}
    for name, whole in even.state_dict(keep_vars=True).items():
        tensor = own.get(name)
        if tensor is None:
            tensor = torch.zeros(whole.shape, dtype=model.dtype, device=model.device)
            rows.pop(id(whole), None)
        for one in rows.get(id(whole), ()):
            shape = list(tensor.shape)
            shape[one.axis] = whole.shape[one.axis]
            tensor = tensor.new_zeros(shape).index_copy_(one.axis, one.others.to(tensor.device), tensor)
        weights[name] = tensor
    even.load_state_dict(weights, strict=True, assign=True)
    even.tie_weights()
    even.generation_config = copy.deepcopy(model.generation_config)
    _restore_buffers(even, model)
    return even.eval()


def _restore_buffers(even: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give ``even`` the buffers that are not in checkpoints (frequencies of rotary embeddings); their sizes are
    equal."""
    theirs = dict(model.named_buffers())
    for path, module in even.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, theirs[f"{path}.{name}".lstrip(".")].clone(), persistent=False)

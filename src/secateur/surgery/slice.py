"""The one place where shapes change: tensors, and the attributes that follow them, are cut by a plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from secateur.errors import ModelError
from secateur.surgery.attributes import (
    adapted_weight,
    adapters_of,
    attribute_changes,
    refresh_sizes,
    refresh_wrapper,
    require_known,
    use_kernels_for_any_width,
)
from secateur.surgery.blocks import remove_layers
from secateur.surgery.configs import changed_configs, renumber_special_tokens
from secateur.surgery.norms import norms_over, restore_epsilon
from secateur.surgery.rows import removed_rows
from secateur.types import Cut, DependencyGraph, Kept
from secateur.units import Rows

M = TypeVar("M", bound=nn.Module)


def slice_model(model: nn.Module, graph: DependencyGraph, kept: Kept) -> None:
    """Keep only the units in ``kept`` of each listed group, in place. A group that is not listed is kept whole.

    Parameters and buffers are replaced by smaller ones of the same dtype, device and ``requires_grad``, without
    gradients; tied ones remain tied. Attributes that follow the axes are set. Values change in one case: where a norm
    runs over the axis and the removed units are already zero, its weights compensate for the smaller divisor
    (``norms``). It works on meta tensors. Everything is checked before the first change. When whole layers, hidden
    dimensions or tokens are removed, the model's config is changed as well, because its code reads it. Otherwise the
    config does not change. Raises PlanError when ``kept`` or ``graph`` does not fit the model, and ModelError when the
    new config would build the kept parts in another way.
    """
    graph.check_kept(kept)
    kept = Cut.keeping(graph, kept)
    cuts: dict[int, list[Rows]] = {}
    for rows in removed_rows(model, graph, kept):
        cuts.setdefault(id(rows.tensor), []).append(rows)
    owners = _owners(model, cuts)
    wrappers = _adapted(model, cuts)
    changes = attribute_changes(model, graph, kept)
    configs = changed_configs(model, graph, kept)
    norms = norms_over(model, graph, kept)

    for module, config in configs.items():  # first: some modules will get a config of their own
        module.config = config  # type: ignore[assignment]
    for key in list(cuts):
        small = _smaller(cuts.pop(key))  # drops the last reference here, so that the large one is freed now
        for module, name in owners[key]:
            setattr(module, name, small)
    for norm, cut in norms.items():
        if cut.factor != 1:
            with torch.no_grad():
                norm.get_parameter("weight").mul_(cut.factor)
            restore_epsilon(norm)
    for module in {id(module): module for places in owners.values() for module, _ in places}.values():
        refresh_sizes(module)
    for wrapper in wrappers:
        refresh_wrapper(wrapper)
    for module, name in (place for places in owners.values() for place in places):
        use_kernels_for_any_width(module, name)
    for change in changes:
        change.apply()
    for group, _ in kept.groups:
        if group.modules:
            remove_layers(model, group, kept[group.name])
        if group.kind == "vocab" and getattr(model, "generation_config", None) is not None:
            renumber_special_tokens(model.generation_config, kept[group.name])


def sharing_copy(model: M) -> M:
    """A copy that shares every tensor with ``model``. It is cheap, and slicing one does not change the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _owners(model: nn.Module, cuts: Mapping[int, list[Rows]]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (module, attribute) where a tensor that is cut hangs; several when it is tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in cuts:
                require_known(module)
                owners.setdefault(id(tensor), []).append((module, name))
    return owners


def _adapted(model: nn.Module, cuts: Mapping[int, list[Rows]]) -> list[LoraLayer]:
    """The adapter layers around weights that are cut; all their adapters must be cut with them."""
    wrappers = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or id(adapted_weight(module)) not in cuts:
            continue
        if not isinstance(module, LoraLayer):
            raise ModelError(f"{path} has a {type(module).__name__} adapter, and only LoRA can be cut. Merge it first.")
        weight = cuts[id(adapted_weight(module))]
        # an axis of the weight is one of A or of B; experts are among the rows of A as well as the columns of B
        axes = len(weight) + sum(rows.tensor.dim() == 3 and rows.axis == 0 for rows in weight)
        for adapter, pair in adapters_of(module).items():
            if sum(len(cuts.get(id(tensor), ())) for tensor in pair) != axes:
                raise ModelError(
                    f"The adapter {adapter!r} of {path} is not active: it is not in the graph and would not be cut. "
                    "Activate, merge or delete it, and trace the model again."
                )
        wrappers.append(module)
    return wrappers


def _smaller(cuts: list[Rows]) -> torch.Tensor:
    """A copy of the tensor without the removed rows of each axis."""
    whole = cuts[0].tensor
    small = whole.detach()
    for rows in cuts:
        small = small.index_select(rows.axis, rows.others.to(whole.device))
    if not isinstance(whole, nn.Parameter):
        return small
    parameter = nn.Parameter(small, requires_grad=whole.requires_grad)
    parameter.__dict__.update(whole.__dict__)  # marks that libraries leave on parameters
    return parameter

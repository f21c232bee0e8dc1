"""Module attributes that follow an axis when it is cut: the only knowledge about model families in the code.

Most forwards read sizes from their tensors (``view(..., -1, head_dim)``) and need no change. Others have numbers of
heads, widths or experts as plain attributes; the table gives the meaning of each name. New values follow from axis
sizes (dense value x units kept / all units), never from trial.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError
from secateur.precision import GROUPED_MULTIPLE
from secateur.types import Cut, DependencyGraph, Kept, Kind, NodeGroup

Meaning = Literal["proportional", "kv_heads", "queries_per_kv", "units", "rows"]


@dataclass(frozen=True)
class Pattern:
    """An attribute that follows the groups of one kind."""

    kind: Kind
    name: str
    meaning: Meaning = "proportional"
    """``proportional``: grows with the units (query heads, widths, experts). ``kv_heads``: as well, unless there is
    one KV head that all units share. ``queries_per_kv``: unchanged when a unit is a KV head with its query heads,
    proportional when the units are the query heads of a single KV head. ``units``: the number of units where it is
    that number, else unchanged. ``rows``: the size of a member that the module holds, where it is that size, else
    unchanged."""
    classes: str = ""
    """Regular expression for the start of the module's class name, where the attribute means this only there."""
    in_config: bool = False
    """The forward reads it from ``self.config``, which all layers share: this module gets its own copy."""
    encloses: bool = False
    """The module is the one around the group, which holds no member itself."""


PATTERNS: tuple[Pattern, ...] = (
    Pattern("attention", "num_key_value_groups", "queries_per_kv"),
    Pattern("attention", "num_key_value_heads", "kv_heads"),
    Pattern("attention", "num_kv_heads", "kv_heads"),
    Pattern("attention", "num_heads"),
    Pattern("attention", "num_attention_heads"),
    Pattern("attention", "num_attn_heads"),
    Pattern("attention", "n_heads"),
    Pattern("attention", "n_head"),
    Pattern("attention", "all_head_size"),
    Pattern("attention", "split_size"),
    Pattern("attention", "embed_dim", classes="GPTBigCode|XGLM|Mvp|TrOCR|Blip"),
    Pattern("attention", "hidden_size", classes="Dbrx|JetMoeMoA"),
    Pattern("attention", "n_groups", "units", classes="DeepseekV4GroupedLinear"),
    Pattern("attention", "o_groups", "units", classes="DeepseekV4Attention", in_config=True),
    Pattern("attention", "num_attention_heads", classes="Phi3|Phi4", in_config=True),
    Pattern("attention", "num_heads", classes="xLSTMLayer", in_config=True),
    Pattern("attention", "v_dim", classes="xLSTMLayer"),
    Pattern("ffn", "intermediate_size"),
    Pattern("ffn", "intermediate_dim"),
    Pattern("ffn", "ffn_hidden_size"),
    Pattern("ffn", "ffn_hidden_size", classes="DbrxExperts", encloses=True),
    Pattern("expert", "num_experts", classes="(?!ParamWrapper)"),
    Pattern("expert", "n_routed_experts"),
    *(Pattern("state", name) for name in ("num_heads", "num_v_heads", "num_k_heads", "key_dim", "value_dim")),
    Pattern("state", "intermediate_size"),
    Pattern("state", "n_groups", "kv_heads"),
    Pattern("state", "conv_dim", "rows"),
    Pattern("state", "group_size", "rows"),
    Pattern("hidden", "hidden_size", "units"),
    Pattern("hidden", "hidden_dim", "units"),
    Pattern("hidden", "embed_dim", "units"),
    Pattern("hidden", "d_model", "units"),
    Pattern("vocab", "vocab_size", "units"),
)


@dataclass(frozen=True)
class Change:
    """An attribute of a module that needs a new value."""

    module: nn.Module
    name: str
    value: int
    in_config: bool = False

    def apply(self) -> None:
        if self.in_config:
            _set_in_own_config(self.module, self.name, self.value)
        else:
            setattr(self.module, self.name, self.value)


def attribute_changes(model: nn.Module, graph: DependencyGraph, kept: Kept) -> list[Change]:
    """The attributes that are wrong after a cut to ``kept``, with their new values; call it before the cut.

    Raises ModelError when a value does not fit its axis.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    changes = []
    for group, removed in Cut.keeping(graph, kept).groups:
        for module, encloses in _home(modules, group) if group.members else ():
            for pattern in _patterns(group.kind):
                holder = getattr(module, "config", None) if pattern.in_config else module
                if (
                    pattern.encloses == encloses
                    and re.match(pattern.classes, type(module).__name__)
                    and isinstance(vars(holder).get(pattern.name) if holder is not None else None, int)
                ):
                    value = _scaled(pattern, holder, module, group, group.size - len(removed))
                    changes.append(Change(module, pattern.name, value, pattern.in_config))
    return changes


def _patterns(kind: Kind) -> list[Pattern]:
    """The patterns that groups of ``kind`` follow.

    Query heads within their KV heads change what counts query heads or those of a KV head, and not what counts the KV
    heads.
    """
    if kind != "query":
        return [pattern for pattern in PATTERNS if pattern.kind == kind]
    return [
        replace(pattern, meaning="proportional")
        for pattern in PATTERNS
        if pattern.kind == "attention" and pattern.meaning in ("proportional", "queries_per_kv")
    ]


def _home(modules: Mapping[str, nn.Module], group: NodeGroup) -> list[tuple[nn.Module, bool]]:
    """The modules of the group: owners of its members, and enclosing modules up to their common ancestor.

    With True the one around that. The vocabulary and the hidden width are the whole model's, also where tied embeddings
    leave only one owner.
    """
    owners = [member.parameter.split(".")[:-1] for member in group.members]
    shared = 0
    while group.kind not in ("vocab", "hidden") and all(
        len(path) > shared and path[shared] == owners[0][shared] for path in owners
    ):
        shared += 1
    paths = {".".join(path[:length]) for path in owners for length in range(shared, len(path) + 1)}
    own = {id(modules[path]): modules[path] for path in sorted(paths)}
    around = [modules[".".join(owners[0][: shared - 1])]] if shared else []
    return [(module, False) for module in own.values()] + [(module, True) for module in around]


def _scaled(pattern: Pattern, holder: Any, module: nn.Module, group: NodeGroup, units: int) -> int:
    dense = int(getattr(holder, pattern.name))
    if pattern.meaning == "kv_heads" and dense == 1:
        return 1
    if pattern.meaning == "units":
        return units if dense == group.size else dense
    if pattern.meaning == "rows":
        return dense - (group.size - units) * _rows_per_unit(module, dense, group)
    if pattern.meaning == "queries_per_kv" and _unit_has_its_kv_head(dense, module, group):
        return dense
    if dense * units % group.size:
        raise ModelError(
            f"{type(module).__name__}.{pattern.name} is {dense}, which does not follow the {group.size} units of "
            f"{group.name}: this model's attention is built in an unknown way. Protect {group.name} (budget.protect)."
        )
    return dense * units // group.size


def _unit_has_its_kv_head(queries_per_kv: int, module: nn.Module, group: NodeGroup) -> bool:
    """True when a unit is a KV head with all its query heads, False when it consists of query heads only."""
    if queries_per_kv == 1:
        return True
    own = vars(module)
    if _kv_heads(module, queries_per_kv) == 1:
        return False
    head_dim = int(own.get("v_head_dim", own.get("head_dim", 0)))  # what the values add up to is consumed
    width = max(member.width for member in group.members if member.role == "in")
    consumed = max(member.rows_per_unit for member in group.members if member.role == "in")
    if head_dim and width % (queries_per_kv * head_dim) == 0:
        return True
    if width == head_dim or consumed * group.size == queries_per_kv * head_dim:
        return False
    raise ModelError(
        f"{group.name} consumes {consumed} columns a unit, which is neither one query head of {head_dim} nor the "
        f"{queries_per_kv} of a KV head. Protect {group.name} (budget.protect)."
    )


def _rows_per_unit(module: nn.Module, size: int, group: NodeGroup) -> int:
    """Rows that a unit has in a weight of ``module``, or of a layer in it, whose axis is ``size`` long; else 0."""
    names = {name for name, tensor in module.named_parameters() if tensor.shape[:1] == (size,)}
    found = {
        (member.parameter, member.axis): 0
        for member in group.members
        if member.axis == 0 and any(f".{member.parameter}".endswith(f".{name}") for name in names)
    }
    for member in group.members:
        if (member.parameter, member.axis) in found:
            found[member.parameter, member.axis] += member.rows_per_unit
    return next(iter(found.values()), 0)


def _kv_heads(module: nn.Module, queries_per_kv: int) -> int | None:
    """Number of KV heads by the attributes of the module, which may not say."""
    heads = next((value for name in ("num_heads", "num_attention_heads") if (value := vars(module).get(name))), None)
    return heads // queries_per_kv if isinstance(heads, int) else None


def require_known(module: nn.Module) -> None:
    """Raise ModelError for a layer of torch whose sizes ``refresh_sizes`` does not update."""
    depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels
    known = depthwise or isinstance(module, (*_SIZED, *_CONTAINERS))
    if type(module).__module__.startswith("torch.nn.modules") and not known:
        raise ModelError(
            f"Cutting a {type(module).__name__} layer is not supported. Protect its group (budget.protect)."
        )


def refresh_sizes(module: nn.Module) -> None:
    """Set the size attributes of a layer from the shapes of its weights, after these were cut."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Conv1d):  # depthwise: one filter for each channel
        module.in_channels = module.out_channels = module.groups = module.weight.shape[0]


def refresh_wrapper(wrapper: LoraLayer) -> None:
    """Set the size attributes of an adapter layer from its adapters, after these were cut."""
    for down, up in adapters_of(wrapper).values():
        wrapper.in_features, wrapper.out_features = down.shape[1], up.shape[0]
    if isinstance(wrapper, ParamWrapper) and wrapper.num_experts > 1:
        wrapper.num_experts = wrapper.get_param().shape[0]


def use_kernels_for_any_width(module: nn.Module, name: str) -> None:
    """Switch stacked experts from the grouped kernels to the eager ones when their new width requires it.

    ``torch.nn.functional.grouped_mm``, the default of transformers, needs rows of a multiple of 16 bytes (8 numbers in
    half precision). It fails for other widths, also in a model that was built with such a width.
    """
    tensor, config = getattr(module, name), getattr(module, "config", None)
    aligned = all(size % GROUPED_MULTIPLE == 0 for size in tensor.shape[1:])
    if tensor.dim() == 3 and not aligned and hasattr(config, "_experts_implementation"):
        _set_in_own_config(module, "_experts_implementation", "eager")


def _set_in_own_config(module: nn.Module, name: str, value: Any) -> None:
    config = copy.copy(module.config)
    setattr(config, name, value)
    module.config = config


def adapters_of(wrapper: LoraLayer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of the adapter → its A of shape [rank, in] and B of shape [out, rank]."""
    linear = {name: (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight) for name in wrapper.lora_A}
    tables = wrapper.lora_embedding_A
    return {**linear, **{name: (tables[name], wrapper.lora_embedding_B[name]) for name in tables}}


def adapted_weight(wrapper: BaseTunerLayer) -> torch.Tensor:
    """The weight that an adapter layer adds to."""
    weight = wrapper.get_param() if isinstance(wrapper, ParamWrapper) else wrapper.get_base_layer().weight
    assert isinstance(weight, torch.Tensor)
    return weight


_SIZED = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)

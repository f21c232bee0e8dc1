"""Does cutting a group compute what removing it should? The model's own forward on small tensors against the mask.

This is independent of how the graph was found: members that are missing, misaligned or too many, and attributes that
went stale, make the two differ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from secateur.errors import ModelError, SecateurError
from secateur.graph import trace
from secateur.progress import track
from secateur.surgery.mask import masked
from secateur.surgery.slice import sharing_copy, slice_model
from secateur.types import DependencyGraph

TOLERANCE = 1e-4
"""Largest difference of logits in fp32, relative to the largest logit (at least 1)."""
WHOLE_UP_TO = 300_000_000
"""Models with more parameters are verified on a twin with few layers and random weights."""
TWIN_LAYERS, TWIN_VOCABULARY = 4, 512


@dataclass(frozen=True)
class Check:
    """What came out for one group, for ``all groups`` or for ``some groups``."""

    group: str
    ok: bool
    max_difference: float
    """Largest absolute difference of logits between the sliced and the masked model; inf when one did not run."""
    effect: float
    """Largest absolute change of logits by the mask; a check with hardly any effect proves nothing and is not ok."""
    message: str


def verify(model: PreTrainedModel | PeftModel, *, seed: int = 0, ratio: float = 0.5) -> list[Check]:
    """Compare slicing with masking: each group that may be cut alone, all together, and a random subset.

    Args:
        seed: draws the token ids, the units that go, and the weights of a twin.
        ratio: fraction of each group's units that go (at least one goes and one stays).

    The given model is not touched: a copy in fp32 is cut. A model with more than ``WHOLE_UP_TO`` parameters, or
    without weights, is represented by a twin of the same configuration with fewer layers (the messages say so).
    Raises ModelError when the model cannot be traced.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        empty = any(parameter.is_meta for parameter in model.parameters())
        twin = _twin(model) if empty or size > WHOLE_UP_TO else None
        subject = (copy.deepcopy(model) if twin is None else twin).float().eval()
        note = "" if twin is None else f" on a twin with random weights and {subject.config.num_hidden_layers} layers"
        graph = trace(subject)
        if twin is not None:
            _require_alike(graph, trace(model))
        choices = _choices(graph, ratio)
        vocabulary = subject.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (2, 12), device=subject.device)
        dense = _logits(subject, ids)
        return [
            _check(subject, graph, name, kept, ids, dense, note)
            for name, kept in track(choices.items(), "verify", total=len(choices))
        ]


def _choices(graph: DependencyGraph, ratio: float) -> dict[str, dict[str, list[int]]]:
    """Name of a check → units to keep."""
    kept = {}
    for group in graph.prunable:
        goes = min(max(1, round(ratio * group.size)), group.size - 1)
        if goes > 0:
            kept[group.name] = sorted(torch.randperm(group.size)[goes:].tolist())
    choices = {name: {name: units} for name, units in kept.items()}
    if len(kept) > 1:
        choices["all groups"] = kept
        some = [name for name in kept if torch.rand(()) < 0.5] or [next(iter(kept))]
        # every group its own number of units, as in a globally ranked plan
        choices["some groups"] = {name: kept[name][: int(torch.randint(1, len(kept[name]) + 1, ()))] for name in some}
    return choices


def _check(
    model: nn.Module,
    graph: DependencyGraph,
    name: str,
    kept: Mapping[str, list[int]],
    ids: torch.Tensor,
    dense: torch.Tensor,
    note: str,
) -> Check:
    try:
        with masked(model, graph, kept):
            expected = _logits(model, ids)
        small = sharing_copy(model)
        slice_model(small, graph, kept)
        sliced = _logits(small, ids)
    except (SecateurError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return Check(name, False, float("inf"), 0.0, f"{type(error).__name__}: {reason}{note}")
    scale = max(1.0, float(dense.abs().max()))
    difference, effect = float((sliced - expected).abs().max()), float((expected - dense).abs().max())
    if not difference <= TOLERANCE * scale:  # NaN is a difference
        return Check(name, False, difference, effect, f"slicing differs from masking by {difference:.1e}{note}")
    if effect <= 10 * max(difference, 1e-6 * scale):
        return Check(name, False, difference, effect, f"the mask has no visible effect ({effect:.1e}){note}")
    return Check(name, True, difference, effect, f"slice = mask{note}")


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _twin(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The same configuration with few layers, a small vocabulary and random weights, adapters included."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = _fewer_layers(copy.deepcopy(base.config))
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=base.config._attn_implementation)
    if type(twin) is not type(base):
        raise ModelError(f"Cannot build a smaller {type(base).__name__} from its config to verify it.")
    if isinstance(model, PeftModel):
        twin = get_peft_model(twin, copy.deepcopy(model.active_peft_config))
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes
            nn.init.normal_(parameter, std=0.02)
    return twin


def _require_alike(twin: DependencyGraph, whole: DependencyGraph) -> None:
    """The layers of the twin must have the groups of the model's first layers."""
    known = {(group.name, group.kind, group.size, group.protected) for group in whole}
    for group in twin:
        if group.layer is not None and (group.name, group.kind, group.size, group.protected) not in known:
            raise ModelError(f"{group.name} of a model with few layers is not that of this model: cannot verify it.")


def _fewer_layers(config: PretrainedConfig) -> PretrainedConfig:
    layers = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # such as layer_types
            setattr(config, name, value[:TWIN_LAYERS])
    config.num_hidden_layers = min(layers, TWIN_LAYERS)
    config.vocab_size = min(config.vocab_size, TWIN_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config

"""The ratio to reach, and the groups that may be cut for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from secateur.analysis import Analysis, Deviation, percent
from secateur.errors import PlanError
from secateur.planning.shapes import RunsOn, needs_equal_widths, refusal
from secateur.reading import brief
from secateur.types import DependencyGraph, Kind, NodeGroup, Settings


class Budget(Settings):
    """How much to prune, from which groups, and which programs must open the result."""

    ratio: float = 0.2
    """Fraction of all parameters to remove, strictly between 0 and 1."""
    rounds: int = Field(default=1, ge=1, le=100)
    """Rounds of choosing, repairing, cutting and recovering. Each removes an equal part of the parameters that go in
    all, and scores the smaller and recovered model anew. For ffn, attention and query, and methods that do not train.
    Scores are not kept."""
    kinds: tuple[Kind, ...] = ("ffn", "attention")
    """Which kinds of groups may be cut. ``ffn``: channels of feed-forward layers and of experts; ``attention``: KV
    heads with their query heads; ``query``, instead of ``attention``: query heads, equally many of each KV head;
    ``expert``: routed experts; ``layer``: whole decoder layers; ``hidden``: width of the residual stream; ``vocab``:
    tokens (only without a tokenizer); ``state``: units of state-space layers."""
    floor: float = Field(default=0.8, ge=0, le=1)
    """Every group keeps at least this fraction of its size after an even cut to the same ratio, and at least one unit.
    With 0, ranking may leave a group one unit. With 1, the cut is even. Every one of several rounds counts from the
    size that the last one left."""
    ranking: Literal["global", "layer"] = "global"
    """``global``: units compete over the whole model, and widths differ between layers. ``layer``: every group of a
    kind (and size) loses the same number of units, and widths are equal."""
    shares: dict[str, float] = Field(default_factory=dict)
    """Separate ratios for some groups, by kind, name or pattern of names, such as ``{attention: 0.1}`` or
    ``{layers.0.*: 0.05}``: this fraction of the parameters of these groups is removed, and the other groups make up for
    the difference to ``ratio``. A group with several matches belongs to the first; 0 excludes it from pruning."""
    normalise: Literal["auto", "mean", "parameters", "none"] = "auto"
    """How scores of different groups are made comparable. ``mean``: divided by the mean of the group; ``parameters``:
    divided by the number of parameters removed with the unit; ``none``: unchanged; ``auto``: ``parameters`` for scores
    that estimate a loss (taylor), ``none`` for scores that already have one scale (flap), ``mean`` for all others."""
    round_to: dict[Kind, int] = Field(default_factory=dict)
    """Kept units are rounded to a multiple of this, by kind, such as ``{ffn: 64}``. Groups that are not cut keep their
    size."""
    protect: tuple[str, ...] = ()
    """Groups that are excluded from pruning: names or patterns, such as ``layers.0.*`` or ``*.attention``."""
    protect_first: int | float = Field(default=0, ge=0)
    """Number of decoder layers at the start that are not pruned; below 1, a share of all layers (0.1: a tenth)."""
    protect_last: int | float = Field(default=0, ge=0)
    """Number of decoder layers at the end that are not pruned; below 1, a share of all layers."""
    protect_from: Path | None = None
    """The analysis.json that `secateur analyze` wrote for this model. Its most sensitive groups are not pruned, and no
    layer with one of them is removed."""
    protect_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the analysed groups that protect_from excludes from pruning, most sensitive first, at least one
    (LoRAShear's γ_u)."""
    protect_by: Deviation = "kl"
    """The measure of sensitivity when a part of a group is removed: ``kl`` of the predictions, or ``perplexity``."""
    runs_on: RunsOn = "transformers"
    """Programs that must open the result. ``transformers`` supports any widths. ``vllm``, ``llama.cpp`` and
    ``everywhere`` need equal widths, FFN widths that are multiples of 64 or 256, and head counts that the family
    allows."""

    @field_validator("ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float:
        try:
            ratio = float(value)
        except (TypeError, ValueError):
            ratio = math.nan
        if isinstance(value, bool) or not 0 < ratio < 1:
            raise ValueError(
                f"a ratio must be strictly between 0 and 1 (0.2 removes a fifth of all parameters); got {brief(value)}"
            )
        return ratio

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(get_args(Kind))}")
        if {"attention", "query"} <= set(value):
            raise ValueError(
                "attention removes KV heads with all their query heads, query removes query heads from KV heads, and "
                "the two cannot be combined; name one of the two, and the other in a second run on the result"
            )
        return value

    @field_validator("protect_first", "protect_last")
    @classmethod
    def _whole_layers(cls, value: int | float) -> int | float:
        if value >= 1 and value != int(value):
            raise ValueError(f"a whole number of layers, or a share of them below 1; got {value}")
        return value

    @field_validator("shares")
    @classmethod
    def _fractions(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(0 <= ratio < 1 for ratio in value.values()):
            raise ValueError(f"ratios of shares are at least 0 and below 1; got {value}")
        return value

    @field_validator("round_to")
    @classmethod
    def _multiples(cls, value: dict[Kind, int]) -> dict[Kind, int]:
        if any(multiple < 1 for multiple in value.values()):
            raise ValueError(f"multiples must be at least 1; got {value}")
        return value

    @model_validator(mode="after")
    def _equal_widths(self) -> Budget:
        if needs_equal_widths(self.runs_on) and (self.protect_first or self.protect_last or self.protect_from):
            raise ValueError(
                f"runs_on={self.runs_on} needs the same widths in every layer, therefore no layers can be protected; "
                "set protect_first and protect_last to 0 and protect_from to null, or runs_on to transformers"
            )
        return self

    @property
    def equal_widths(self) -> bool:
        """Whether all groups of a kind and size keep the same number of units."""
        return self.ranking == "layer" or needs_equal_widths(self.runs_on)


def restrict(graph: DependencyGraph, budget: Budget) -> DependencyGraph:
    """The same graph, in which every group that this budget excludes is protected, with the reason.

    Scores and masks of the restricted graph cover the prunable groups only. Raises PlanError for a pattern in
    ``budget.protect`` that matches no group (a typing error would leave a group unprotected), for an analysis that
    cannot be read or is of another model, and for a kind in ``budget.kinds`` without prunable groups in this model
    (except ``ffn`` and ``attention``, which are the default).
    """
    for pattern in budget.protect:
        if not any(fnmatchcase(group.name, pattern) for group in graph):
            names = ", ".join(group.name for group in graph.prunable[:4])
            raise PlanError(f"budget.protect: no group is called {pattern!r}. Names are {names} and so on.")
    graph = graph.opened(budget.kinds)
    for kind in budget.kinds:
        if kind not in ("ffn", "attention"):
            _require_some(graph, kind)
    layers = [group.layer for group in graph if group.layer is not None]
    last = max(layers, default=-1)
    sensitive = _sensitive(graph, budget)
    reasons = {
        group.name: group.protected or sensitive.get(group.name) or _reason(group, graph, budget, last)
        for group in graph
    }
    if needs_equal_widths(budget.runs_on):
        stuck = {_width_class(group): group.name for group in graph if reasons[group.name] is not None}
        for group in graph.prunable:
            if reasons[group.name] is None and _width_class(group) in stuck:
                other = stuck[_width_class(group)]
                reasons[group.name] = f"{budget.runs_on} needs equal widths, and {other} is not pruned"
    groups = (_narrowed(group, graph, budget, reasons[group.name], sensitive) for group in graph)
    return replace(graph, groups=tuple(groups))


def _require_some(graph: DependencyGraph, kind: Kind) -> None:
    """Raise PlanError when no group of ``kind`` may be cut."""
    groups = [group for group in graph if group.kind == kind]
    if not groups:
        raise PlanError(f"budget.kinds names {kind}, and this {graph.model_type} model has no group of that kind.")
    if all(group.protected is not None for group in groups):
        reasons = "; ".join(sorted({group.protected or "" for group in groups}))
        raise PlanError(f"budget.kinds names {kind}, which cannot be cut in this {graph.model_type} model: {reasons}.")


def _narrowed(
    group: NodeGroup, graph: DependencyGraph, budget: Budget, reason: str | None, sensitive: Mapping[str, str]
) -> NodeGroup:
    """``group`` with the reason why it is protected; a group of whole layers with the layers that the budget keeps."""
    if reason is not None:
        unchanged = reason == group.protected and not group.on_request
        return group if unchanged else replace(group, protected=reason, on_request=False)
    fixed = dict(group.fixed)
    for layer in range(len(group.modules)):
        names = [other.name for other in graph if other.layer == layer]
        found = next((sensitive[name] for name in names if name in sensitive), None)
        why = _kept_layer(layer, names, budget, len(group.modules) - 1) or found
        if why is not None:
            fixed.setdefault(layer, why)
    if group.fixed != tuple(sorted(fixed.items())):
        group = replace(group, fixed=tuple(sorted(fixed.items())))
    if group.fixed and not group.movable:
        return replace(group, protected=f"all of its units must be kept: {fixed[0]}", on_request=False)
    return group if group.protected is None else replace(group, protected=None)


def _kept_layer(layer: int, names: Sequence[str], budget: Budget, last_layer: int) -> str | None:
    """Why a decoder layer with the groups ``names`` must be kept; None when it may be removed."""
    if any(fnmatchcase(name, pattern) for name in names for pattern in budget.protect):
        return "named in budget.protect"
    first, last = (_layers(count, last_layer + 1) for count in (budget.protect_first, budget.protect_last))
    if layer < first:
        return f"one of the first {first} layers (budget.protect_first)"
    if layer > last_layer - last:
        return f"one of the last {last} layers (budget.protect_last)"
    return None


def _sensitive(graph: DependencyGraph, budget: Budget) -> dict[str, str]:
    """Reasons for the groups that are the most sensitive by the analysis in ``budget.protect_from``.

    Query heads of a protected group of KV heads are protected as well, and vice versa: both cut the same rows. Raises
    PlanError when the budget would not cut any of these groups anyway.
    """
    if budget.protect_from is None:
        return {}
    analysis = Analysis.load(budget.protect_from)
    analysis.check(graph, budget.protect_from)
    share, by = budget.protect_share, budget.protect_by
    deviations = analysis.deviations(by)
    most = {
        name: f"among the most sensitive {percent(share)} ({by} moves by {deviations[name]:.3g})"
        for name in analysis.sensitive(share, by)
    }
    parts = {group.name: most[group.within] for group in graph if group.within in most}
    wholes = {group.within: most[group.name] for group in graph if group.within is not None and group.name in most}
    reasons = {**parts, **wholes, **most}
    if "layer" not in budget.kinds and not any(graph[name].kind in budget.kinds for name in reasons):
        raise PlanError(
            f"budget.protect_from protects nothing: this budget cuts {', '.join(budget.kinds)}, and none of the most "
            f"sensitive {percent(share)} is of that kind ({', '.join(list(most)[:4])} ...). "
            "Raise budget.protect_share, or set budget.protect_from to null."
        )
    return reasons


def _reason(group: NodeGroup, graph: DependencyGraph, budget: Budget, last_layer: int) -> str | None:
    if group.kind not in budget.kinds:
        return f"{group.kind} is not among budget.kinds"
    if any(fnmatchcase(group.name, pattern) for pattern in budget.protect):
        return "named in budget.protect"
    if group.layer is not None:
        why = _kept_layer(group.layer, (), budget, last_layer)
        if why is not None:
            return why
    return refusal(group, graph.model_type, budget.runs_on)


def _layers(count: int | float, layers: int) -> int:
    """``count`` of ``layers``; below 1 it is a share of them."""
    return round(count * layers) if count < 1 else int(count)


def _width_class(group: NodeGroup) -> tuple[Kind, int]:
    return group.kind, group.size

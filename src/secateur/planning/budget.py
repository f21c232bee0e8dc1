"""What must be reached, and which groups may pay for it."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from secateur.errors import PlanError
from secateur.planning.shapes import RunsOn, needs_equal_widths, refusal
from secateur.types import DependencyGraph, Kind, NodeGroup, Settings


class Budget(Settings):
    """How much must go, from where, and what must open the result."""

    ratio: float = 0.2
    """Fraction of all parameters to remove, strictly between 0 and 1."""
    kinds: tuple[Kind, ...] = ("ffn", "attention")
    """Which kinds of groups may be cut."""
    floor: float = Field(default=0.8, ge=0, le=1)
    """Every group keeps at least this fraction of what an even cut to the same ratio would leave it, and at least one
    unit; 0 lets ranking empty a group down to one unit, 1 makes the cut even."""
    ranking: Literal["global", "layer"] = "global"
    """``global``: units compete over the whole model, so that widths differ between layers; ``layer``: the same number
    of units goes in every group of a kind (and size), so that widths stay equal."""
    normalise: Literal["auto", "mean", "parameters", "none"] = "auto"
    """What makes scores of different groups comparable. ``mean``: each relative to the mean of its group;
    ``parameters``: divided by the parameters that go with the unit; ``none``: as they are; ``auto``: ``parameters``
    for scores that estimate a loss (taylor), ``mean`` for all others."""
    round_to: dict[Kind, int] = Field(default_factory=dict)
    """Kept units are rounded to a multiple of this, by kind, such as ``{ffn: 64}``; groups that are not cut stay."""
    protect: tuple[str, ...] = ()
    """Groups that must stay whole: names or patterns, such as ``layers.0.*`` or ``*.attention``."""
    protect_first: int = Field(default=0, ge=0)
    """The first so many decoder layers stay whole."""
    protect_last: int = Field(default=0, ge=0)
    """The last so many decoder layers stay whole."""
    runs_on: RunsOn = "transformers"
    """What must open the result. ``transformers`` takes any widths; ``vllm``, ``llama.cpp`` and ``everywhere`` need
    equal widths, FFN widths that are multiples of 64 or 256, and head counts that the family allows."""

    @field_validator("ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float:
        try:
            ratio = float(value)
        except (TypeError, ValueError):
            ratio = math.nan
        if isinstance(value, bool) or not 0 < ratio < 1:
            raise ValueError(
                f"a ratio lies strictly between 0 and 1 (0.2 removes a fifth of all parameters); got {value!r}"
            )
        return ratio

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(get_args(Kind))}")
        return value

    @field_validator("round_to")
    @classmethod
    def _multiples(cls, value: dict[Kind, int]) -> dict[Kind, int]:
        if any(multiple < 1 for multiple in value.values()):
            raise ValueError(f"multiples must be at least 1; got {value}")
        return value

    @model_validator(mode="after")
    def _equal_widths(self) -> Budget:
        if needs_equal_widths(self.runs_on) and (self.protect_first or self.protect_last):
            raise ValueError(
                f"runs_on={self.runs_on} needs the same widths in every layer, so that no layers can be protected; "
                "set protect_first and protect_last to 0, or runs_on to transformers"
            )
        return self

    @property
    def equal_widths(self) -> bool:
        """Whether all groups of a kind and size keep the same number of units."""
        return self.ranking == "layer" or needs_equal_widths(self.runs_on)


def restrict(graph: DependencyGraph, budget: Budget) -> DependencyGraph:
    """The same graph with every group protected that this budget must not touch, and the reason.

    Score and mask with this one, and only what can be cut is looked at. Raises PlanError for a pattern in
    ``budget.protect`` that no group has: a typing error would leave unprotected what was meant.
    """
    for pattern in budget.protect:
        if not any(fnmatchcase(group.name, pattern) for group in graph):
            names = ", ".join(group.name for group in graph.prunable[:4])
            raise PlanError(f"budget.protect: no group is called {pattern!r}. Names are {names} and so on.")
    layers = [group.layer for group in graph if group.layer is not None]
    last = max(layers, default=-1)
    reasons = {group.name: group.protected or _reason(group, graph, budget, last) for group in graph}
    if needs_equal_widths(budget.runs_on):
        stuck = {_width_class(group): group.name for group in graph if reasons[group.name] is not None}
        for group in graph.prunable:
            if reasons[group.name] is None and _width_class(group) in stuck:
                other = stuck[_width_class(group)]
                reasons[group.name] = f"{budget.runs_on} needs equal widths, and {other} must stay whole"
    return replace(graph, groups=tuple(replace(group, protected=reasons[group.name]) for group in graph))


def _reason(group: NodeGroup, graph: DependencyGraph, budget: Budget, last_layer: int) -> str | None:
    if group.kind not in budget.kinds:
        return f"{group.kind} is not among budget.kinds"
    if any(fnmatchcase(group.name, pattern) for pattern in budget.protect):
        return "named in budget.protect"
    if group.layer is not None and group.layer < budget.protect_first:
        return f"one of the first {budget.protect_first} layers (budget.protect_first)"
    if group.layer is not None and group.layer > last_layer - budget.protect_last:
        return f"one of the last {budget.protect_last} layers (budget.protect_last)"
    return refusal(group, graph.model_type, budget.runs_on)


def _width_class(group: NodeGroup) -> tuple[Kind, int]:
    return group.kind, group.size

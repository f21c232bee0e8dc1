"""The plan: the kept units, and the model, ratio and settings that they were chosen for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version

from secateur.planning.budget import Budget
from secateur.planning.problem import countable
from secateur.types import Cut, DependencyGraph, PruningPlan

_VERSIONS = ("secateur", "torch", "transformers", "peft")


def make_plan(
    graph: DependencyGraph,
    removed: Mapping[str, Iterable[int]],
    budget: Budget,
    *,
    method: str,
    seed: int = 0,
    base_model: str = "",
    revision: str | None = None,
) -> PruningPlan:
    """The plan of the units kept when ``removed`` are removed, with exact parameter counts (without adapters).

    Raises PlanError when a group loses all its units, is protected, or does not exist.
    """
    kept = Cut.removing(graph, removed)
    graph.check_kept(kept)
    counted = countable(graph)
    before, after = counted.parameter_count(), counted.parameter_count(kept)
    return PruningPlan(
        base_model=base_model,
        revision=revision,
        fingerprint=graph.fingerprint,
        method=method,
        ratio_asked=budget.ratio,
        ratio_reached=1 - after / before,
        parameters_before=before,
        parameters_after=after,
        seed=seed,
        versions=versions(),
        sizes={name: graph[name].size for name in kept},
        kept={name: list(units) for name, units in kept.items()},
    )


def versions() -> dict[str, str]:
    """The versions of the packages that determine the result, for the record."""
    return {name: version(name) for name in _VERSIONS}


def decoder_ratio(plan: PruningPlan, graph: DependencyGraph) -> float:
    """Removed fraction of the parameters of the decoder layers (without embeddings, head and final norm)."""
    counted = countable(graph)
    inside = [name for name in counted.shapes if any(part.isdigit() for part in name.split("."))]
    before = sum(counted.numel(name, {}) for name in inside)
    after = sum(counted.numel(name, plan.kept) for name in inside)
    return 1 - after / before if before else 0.0


def describe_plan(plan: PruningPlan, graph: DependencyGraph) -> str:
    """The plan in a few lines: both ratios, and the range of widths that each kind keeps."""
    head = (
        f"{plan.method}: {plan.ratio_reached:.1%} of all parameters removed (asked {plan.ratio_asked:.1%}), "
        f"{decoder_ratio(plan, graph):.1%} of the decoder layers; {plan.parameters_before / 1e6:.1f}M → "
        f"{plan.parameters_after / 1e6:.1f}M"
    )
    lines = [head]
    for kind, size in sorted({(graph[name].kind, graph[name].size) for name in plan.kept}):
        groups = [group for group in graph if group.kind == kind and group.size == size]
        counts = [len(plan.kept.get(group.name, range(size))) for group in groups]
        widths = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines.append(f"  {kind}: {widths} of {size} units in {len(groups)} groups")
    return "\n".join(lines)

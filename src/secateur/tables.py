"""The tables that the command line prints, made from plain numbers (the ``metrics`` of a run)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from secateur.export.story import beside, show_bytes, show_count, show_number
from secateur.surgery import Check
from secateur.types import DependencyGraph, NodeGroup

STATES = ("dense", "pruned", "recovered")


def results(metrics: Mapping[str, Any], states: Sequence[str] = STATES) -> Group:
    """Models side by side, each compared with the first; the baseline of a run stands beside it.

    ``metrics`` is what ``metrics.json`` holds: per state the perplexity by source, parameters, bytes and tokens per
    second; what was not measured is left out.
    """
    states = [state for state in states if state in metrics]
    columns = {states[0]: metrics[states[0]]}
    if "baseline" in metrics:
        columns[metrics["baseline"]["name"]] = metrics["baseline"]
    columns |= {state: metrics[state] for state in states[1:]}
    whole = metrics[states[0]]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == states[-1] else None)
    for source in whole.get("perplexity", {}):
        table.add_row(
            f"perplexity, {source}", *(show_number(item.get("perplexity", {}).get(source)) for item in columns.values())
        )
    counts = metrics.get("tokens", {})
    if len(counts) > 1:
        means = (mean_perplexity(item.get("perplexity", {}), counts) for item in columns.values())
        table.add_row("perplexity, all", *map(show_number, means))
    for task, values in whole.get("tasks", {}).items():
        for metric, value in values.items():
            table.add_row(f"{task}, {metric}", f"{value:.4f}")
    table.add_section()
    for label, key, show in (
        ("parameters", "parameters", show_count),
        ("size on disk", "bytes", show_bytes),
        ("prefill, tokens/s", "prefill_tokens_per_s", show_number),
        ("decode, tokens/s", "decode_tokens_per_s", show_number),
    ):
        if key in whole:
            table.add_row(label, *(beside(item.get(key), whole[key], show) for item in columns.values()))
    return Group(table, _caption(metrics))


def mean_perplexity(perplexity: Mapping[str, float], tokens: Mapping[str, int]) -> float | None:
    """Perplexity over all sources together: exp of the token-weighted mean loss; None when one is missing."""
    if not set(tokens) <= set(perplexity):
        return None
    loss = sum(count * math.log(perplexity[source]) for source, count in tokens.items())
    return math.exp(loss / sum(tokens.values()))


def groups(graph: DependencyGraph) -> Group:
    """The node groups of a model; alike ones of different layers share a line."""
    alike: dict[tuple[str, str, int, str], list[NodeGroup]] = {}
    for group in graph:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", group.name)
        alike.setdefault((pattern, group.kind, group.size, group.protected or ""), []).append(group)
    total = graph.parameter_count()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("group", no_wrap=True)
    table.add_column("kind")
    for name in ("units", "params/unit", "share"):
        table.add_column(name, justify="right")
    table.add_column("cannot be cut because", overflow="fold")
    for (pattern, kind, size, reason), members in alike.items():
        cost = sum(graph.unit_cost(group) for group in members)
        units = f"{len(members)} x {size:,}" if len(members) > 1 else f"{size:,}"
        share = f"{cost * size / total:.1%}"
        table.add_row(pattern, kind, units, f"{cost // len(members):,}", share, reason)
    return Group(table, f"{graph.model_type}, {show_count(total)} parameters")


def checks(found: Sequence[Check]) -> Table:
    """What ``inspect --verify`` found, worst first."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("cut", no_wrap=True)
    table.add_column("largest difference", justify="right")
    table.add_column("", overflow="fold")
    for check in sorted(found, key=lambda check: (check.ok, -check.max_difference)):
        table.add_row(check.group, f"{check.max_difference:.1e}", check.message, style=None if check.ok else "red")
    return table


def _caption(metrics: Mapping[str, Any]) -> str:
    counts = metrics.get("tokens", {})
    parts = []
    if counts and "window" in metrics:
        parts.append(f"Perplexity over {sum(counts.values()):,} tokens in windows of {metrics['window']} tokens.")
    machine = metrics.get("machine", {})
    if machine:
        threads = f", {machine['threads']} threads" if not machine["gpu"] else ""
        parts.append(f"Measured on {machine['gpu'] or machine['processor']}{threads}; one sequence at a time.")
    return " ".join(parts)

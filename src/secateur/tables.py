"""The tables that the command line prints, made from plain numbers (the ``metrics`` of a run)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from secateur.analysis import Analysis, Deviation, percent
from secateur.compare import Leaderboard, columns_of, shown
from secateur.export import Comparison, Verification
from secateur.export.story import show_count, show_number
from secateur.surgery import Check
from secateur.types import DependencyGraph, NodeGroup


def results(comparison: Comparison) -> Group:
    """Models side by side; the last one is the result of the run."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in comparison.columns:
        table.add_column(name, justify="right", style="bold" if name == comparison.columns[-1] else None)
    for label, cells in comparison.rows:
        if label == "parameters":
            table.add_section()
        table.add_row(label, *cells)
    return Group(table, comparison.caption)


def leaderboard(found: Leaderboard) -> Table:
    """The rows of ``secateur compare``, the dense model first."""
    table = Table(box=SIMPLE_HEAD)
    columns = columns_of(found)
    for name in columns:
        first = name == columns[0]
        table.add_column(name, justify="left" if first else "right", overflow="fold", no_wrap=first)
    for line in shown(found):
        table.add_row(*(line if len(line) == len(columns) else [*line[:2], "failed"]))
    failed = [f"{row.method} at {row.ratio:.1%}: {row.error}" for row in found.rows if row.error is not None]
    table.caption = Text("\n".join(failed), justify="left") if failed else None
    return table


def groups(graph: DependencyGraph) -> Group:
    """The node groups of a model. Equal groups of different layers share a line."""
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


def analysis(found: Analysis, *, by: Deviation, share: float) -> Group:
    """Node groups by sensitivity, most sensitive first; below the table, the groups that would be protected."""
    ratios = sorted({trial.ratio for trial in found.trials})
    table = Table(box=SIMPLE_HEAD)
    table.add_column("group", no_wrap=True)
    table.add_column("kind")
    table.add_column("units", justify="right")
    for ratio in ratios:
        table.add_column(f"-{percent(ratio)}: KL", justify="right")
        table.add_column("perplexity", justify="right")
    table.add_column("stays whole")
    sensitive = found.sensitive(share, by)
    for name in found.deviations(by):
        own = {trial.ratio: trial for trial in found.trials if trial.group == name}
        first = next(iter(own.values()))
        cells = [
            cell
            for trial in (own[ratio] for ratio in ratios)
            for cell in (f"{trial.kl:.4f}", show_number(math.exp(min(trial.loss, 700.0))))
        ]
        mark = "yes" if name in sensitive else ""
        table.add_row(name, first.kind, f"{first.units:,}", *cells, mark, style="bold" if mark else None)
    caption = (
        f"The whole model has perplexity {show_number(math.exp(found.dense_loss))} on {found.tokens:,} tokens of "
        f"{', '.join(found.text)}. Each group was cut alone, with units chosen by {found.criterion}. The most "
        f"sensitive {percent(share)} by {by} ({len(sensitive)} of {len(found.deviations(by))} groups) is marked: "
        "budget.protect_from excludes it from pruning."
    )
    return Group(table, caption)


def check_table(found: Sequence[Check]) -> Table:
    """The results of ``inspect --verify``, worst first."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("cut", no_wrap=True)
    table.add_column("largest difference", justify="right")
    table.add_column("", overflow="fold")
    for check in sorted(found, key=lambda check: (check.ok, -check.max_difference)):
        table.add_row(check.group, f"{check.max_difference:.1e}", check.message, style=None if check.ok else "red")
    return table


def verdicts(found: Verification) -> Group:
    """The results of ``verify`` for a folder, and the programs that support it."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("program", "opens it", "because"):
        table.add_column(name, overflow="fold")
    for verdict in found.runtimes:
        table.add_row(verdict.runtime, verdict.opens, f"{verdict.why} ({verdict.basis})")
    text = (
        f"{found.class_name} with {found.parameters:,} parameters opens in a fresh process. Logits differ by at most "
        f"{found.logits_difference:.1e} of {found.logits_scale:.1f} in {found.dtype}."
    )
    return Group(table, text if found.sample is None else f"{text}\nIt writes: {found.sample}")

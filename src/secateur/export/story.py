"""The facts of a run for the model card and the report, and the comparison that both show."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from secateur.export.verify import Verification
from secateur.types import DependencyGraph, PruningPlan

_STATES = ("dense", "pruned", "recovered")
_UNITS: Mapping[str, str] = {
    "attention": "attention heads",
    "ffn": "feed-forward channels",
    "expert": "experts",
    "layer": "decoder layers",
    "hidden": "dimensions of the hidden state",
    "vocab": "tokens of the vocabulary",
    "state": "units of state-space layers",
}


@dataclass(frozen=True)
class Story:
    """The facts of a run, as in its artefacts."""

    plan: PruningPlan
    graph: DependencyGraph
    """The graph of the model before the cut."""
    verification: Verification
    recipe: str = ""
    """YAML."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """As in ``metrics.json``; everything is optional. Per state (``dense``, ``pruned``, ``recovered``, and
    ``baseline``, which has a ``name``): ``perplexity`` by source, ``parameters``, ``bytes``, ``prefill_tokens_per_s``,
    ``decode_tokens_per_s``. ``tokens`` by source, ``window`` and ``windows`` (as ``evaluation.Windows``) describe the
    text of perplexity, ``machine`` that of speed, ``seconds`` the time of each stage, ``rounds`` the numbers of each
    round before the last. Lists of ``{step, loss}``
    anywhere below ``method`` and ``recovery`` are training curves."""
    licence: str | None = None
    """Licence of the base model, when it is known."""

    @property
    def base(self) -> str:
        """Name of the base model; only the last part of a local folder's path, because the rest is private."""
        name = self.plan.base_model
        return Path(name).expanduser().resolve().name if Path(name).is_dir() else name or self.graph.model_type

    @property
    def gone(self) -> str:
        """The kinds of removed units, in words; empty when there are none."""
        kinds = {self.graph[name].kind for name in self.plan.kept if self.plan.removed(name)}
        return ", ".join(_UNITS.get(kind, kind) for kind in (*_UNITS, *sorted(kinds - set(_UNITS))) if kind in kinds)

    @property
    def title(self) -> str:
        return f"{self.base.rpartition('/')[2]}, {self.plan.ratio_reached:.0%} smaller"


@dataclass(frozen=True)
class Comparison:
    """A table of measurements."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    caption: str


_BY_ROUND = ("parameters left", "loss by repair", "loss by reconstruction", "loss in recovery")


@dataclass(frozen=True)
class Widths:
    """Kept units of the corresponding groups of all layers."""

    name: str
    """For instance ``layers.*.mlp``."""
    kind: str
    size: int
    """Units in the largest layer before."""
    layers: list[tuple[int, int, int]]
    """(Layer, units kept, units before)."""


def compare_states(metrics: Mapping[str, Any], states: Sequence[str] = _STATES) -> Comparison:
    """The states side by side, each compared with the first; the baseline of a run is beside that.

    ``metrics`` is the content of ``metrics.json``. Missing measurements are left out.
    """
    columns = {state: metrics[state] for state in states if state in metrics}
    if "baseline" in metrics:
        first = dict([next(iter(columns.items()))]) if columns else {}
        columns = first | {metrics["baseline"]["name"]: metrics["baseline"]} | columns
    whole: Mapping[str, Any] = next(iter(columns.values()), {})
    rows = [*_quality(whole, columns, metrics.get("tokens", {})), *_cost(whole, columns)]
    return Comparison(list(columns), rows, _caption(metrics, columns.values()))


def _quality(
    whole: Mapping[str, Any], columns: Mapping[str, Any], counts: Mapping[str, int]
) -> Iterator[tuple[str, list[str]]]:
    for source in whole.get("perplexity", {}):
        yield (
            f"perplexity, {source}",
            [show_number(column.get("perplexity", {}).get(source)) for column in columns.values()],
        )
    if len(counts) > 1:
        means = (mean_perplexity(column.get("perplexity", {}), counts) for column in columns.values())
        yield "perplexity, all", [show_number(mean) for mean in means]
    for task, values in whole.get("tasks", {}).items():
        for metric in values:
            scores = (column.get("tasks", {}).get(task, {}).get(metric) for column in columns.values())
            yield f"{task}, {metric}", ["" if score is None else f"{score:.4f}" for score in scores]


def _cost(whole: Mapping[str, Any], columns: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for label, key, show in (
        ("parameters", "parameters", show_count),
        ("size on disk", "bytes", show_bytes),
        ("prefill, tokens/s", "prefill_tokens_per_s", show_number),
        ("decode, tokens/s", "decode_tokens_per_s", show_number),
    ):
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            yield label, [with_change(value, whole.get(key), show) for value in values]


def compare_rounds(metrics: Mapping[str, Any]) -> Comparison:
    """What each round of pruning left, and the losses of its stages; without rows for a run of one round.

    ``metrics`` is the content of ``metrics.json``: the numbers of the last round are those of the whole run.
    """
    earlier = metrics.get("rounds", [])
    if not earlier:
        return Comparison([], [], "")
    last = {**metrics, "parameters": metrics.get("pruned", {}).get("parameters")}
    cells = [_round(numbers) for numbers in (*earlier, last)]
    shown = [place for place in range(len(_BY_ROUND)) if any(row[place] for row in cells)]
    rows = [(str(number), [row[place] for place in shown]) for number, row in enumerate(cells, start=1)]
    caption = (
        "Losses are in nats. Repair and reconstruction are measured on the check windows of the calibration text, "
        "before and after them; recovery on its training text, at its first and last logged step."
    )
    return Comparison([_BY_ROUND[place] for place in shown], rows, caption)


def _round(numbers: Mapping[str, Any]) -> list[str]:
    """The cells of one round; empty where nothing was measured."""
    left, log = numbers.get("parameters"), numbers.get("recovery", {}).get("log", [])
    cells = ["" if left is None else f"{left:,}"]
    for name in ("repair", "reconstruct"):
        found = numbers.get(name)
        cells.append("" if found is None else f"{found['loss_before']:.3f} → {found['loss_after']:.3f}")
    ends = [f"{entry['loss']:.3f} (step {entry['step']:,})" for entry in (log[0], log[-1])] if log else []
    return [*cells, " → ".join(dict.fromkeys(ends))]


def mean_perplexity(perplexity: Mapping[str, float], tokens: Mapping[str, int]) -> float | None:
    """Perplexity over all sources together: exp of the token-weighted mean loss; None when one is missing."""
    if not set(tokens) <= set(perplexity):
        return None
    loss = sum(count * math.log(perplexity[source]) for source, count in tokens.items())
    return math.exp(loss / sum(tokens.values()))


def widths(story: Story) -> list[Widths]:
    """Every set of corresponding groups that may be cut, in model order."""
    alike: dict[str, list[tuple[int, int, int]]] = {}
    kinds = {}
    for group in story.graph.prunable:
        if group.layer is not None:
            name = re.sub(rf"\b{group.layer}\b", "*", group.name, count=1)
            left = len(story.plan.kept.get(group.name, range(group.size)))
            alike.setdefault(name, []).append((group.layer, left, group.size))
            kinds[name] = group.kind
    return [Widths(name, kinds[name], max(size for *_, size in rows), rows) for name, rows in alike.items()]


def curves(metrics: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Training curves as points (step, loss), by their path of keys; those of earlier rounds first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for number, numbers in enumerate(metrics.get("rounds", []), start=1):
        for name in ("method", "recovery"):
            _collect(numbers.get(name), f"round {number}, {name}", found)
    for name in ("method", "recovery"):
        _collect(metrics.get(name), name, found)
    return found


def _collect(value: Any, path: str, found: dict[str, list[tuple[float, float]]]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{path}, {key}", found)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        points = [item for item in value if isinstance(item, Mapping) and "loss" in item]
        steps = [item.get("step", number) for number, item in enumerate(points)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            steps = list(range(len(points)))  # several rounds in a row, each counting from 1
        losses = [float(item["loss"]) for item in points]
        if sum(math.isfinite(loss) for loss in losses) > 1:
            found[path] = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]


def _caption(metrics: Mapping[str, Any], columns: Collection[Mapping[str, Any]]) -> str:
    parts = []
    tokens = metrics.get("tokens", {})
    if tokens and "window" in metrics:
        begin = " ".join(metrics.get("windows", {}).get("begin_with", []))
        scored = f"{begin} begins each and is not scored" if begin else "the first of each is not scored"
        parts.append(
            f"Perplexity over {sum(tokens.values()):,} tokens in windows of {metrics['window']} tokens; {scored}."
        )
    machine = metrics.get("machine", {})
    if machine:
        threads = machine.get("threads")
        where = machine.get("gpu") or f"{machine.get('processor')}, {threads} {'thread' if threads == 1 else 'threads'}"
        timed = any("decode_tokens_per_s" in column for column in columns)
        speed = "; speed of one sequence at a time" if timed else ""
        parts.append(f"Measured on {where}, torch {machine.get('torch')}{speed}.")
    return " ".join(parts)


def with_change(value: float | None, whole: float | None, show: Any) -> str:
    if value is None:
        return ""
    return show(value) if not whole or value == whole else f"{show(value)} ({(value - whole) / whole:+.1%})"


def show_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def show_count(value: float) -> str:
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M" if value >= 1e5 else f"{value:,}"


def show_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}" if unit == "GB" else f"{value / size:.0f} {unit}"
    return f"{value / 1e3:.0f} kB"

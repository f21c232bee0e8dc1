"""Two charts of recovery: the share of each source, and its loss above the dense model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#3c7d4f", "#b5651d", "#3a6ea5", "#8e4585", "#a39128", "#c2483d", "#4f9d9d", "#6b6b6b")


@dataclass(frozen=True)
class Line:
    """One source."""

    name: str
    colour: str
    points: str
    """Points in the coordinates of the chart, in the form of an SVG polyline."""


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of the recovery."""

    title: str
    lines: list[Line]
    low: float
    high: float
    first: int
    last: int


def mixture_charts(metrics: Mapping[str, Any], width: int, height: int, margin: int) -> list[Chart]:
    """Charts of ``metrics["recovery"]["rounds"]`` (see ``recovery.curriculum``); none when there was no round."""
    rounds = metrics.get("recovery", {}).get("rounds", [])
    reference = metrics.get("reference", {})
    if not rounds:
        return []
    names = sorted({name for entry in rounds for name in entry["weights"]})
    shares = {name: [(entry["step"], entry["weights"].get(name, 0.0)) for entry in rounds] for name in names}
    behind = {
        name: [(entry["step"], entry["losses"][name] - reference[name]) for entry in rounds if name in entry["losses"]]
        for name in names
        if name in reference
    }
    frame = (width, height, margin)
    charts = [_chart("Share of each source by step", {name: _stairs(line) for name, line in shares.items()}, frame)]
    if any(len(line) > 1 for line in behind.values()):
        charts.append(_chart("Loss above the dense model's by step, on held-out text", behind, frame))
    return charts


def _stairs(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points of a step function: a share is valid until the next one."""
    drawn = [points[0]]
    for step, share in points[1:]:
        drawn += [(step, drawn[-1][1]), (step, share)]
    return drawn


def _chart(title: str, lines: Mapping[str, Sequence[tuple[int, float]]], frame: tuple[int, int, int]) -> Chart:
    width, height, margin = frame
    values = [value for line in lines.values() for _, value in line if math.isfinite(value)]
    steps = [step for line in lines.values() for step, _ in line]
    low, high, first, last = min([0.0, *values]), max(values, default=1.0), min(steps), max(steps)
    wide, tall = (width - 2 * margin) / ((last - first) or 1), (height - margin) / ((high - low) or 1)

    def place(step: int, value: float) -> str:
        return f"{margin + (step - first) * wide:.1f},{10 + (high - value) * tall:.1f}"

    drawn = [
        Line(name, COLOURS[number % len(COLOURS)], " ".join(place(*point) for point in line if math.isfinite(point[1])))
        for number, (name, line) in enumerate(lines.items())
    ]
    return Chart(title, drawn, low, high, first, last)

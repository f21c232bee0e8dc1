"""The report: one HTML file that needs only a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.export.mixture_chart import mixture_charts
from secateur.export.story import Story, Widths, compare_rounds, compare_states, curves, widths
from secateur.pages import html_page

_WIDTH, _HEIGHT, _MARGIN = 720, 160, 40


def html_report(story: Story) -> str:
    """The whole page. Everything that comes from outside is escaped; nothing is fetched, no script runs."""
    values = {
        "story": story,
        "comparison": compare_states(story.metrics),
        "rounds": compare_rounds(story.metrics),
        "seconds": story.metrics.get("seconds", {}),
        "widths": [{"part": part, "bars": _bars(part)} for part in widths(story)],
        "curves": {name: _curve(points) for name, points in curves(story.metrics).items()},
        "mixtures": mixture_charts(story.metrics, _WIDTH, _HEIGHT, _MARGIN),
        "chart": {"width": _WIDTH, "height": _HEIGHT, "margin": _MARGIN},
    }
    return html_page("secateur.export", "templates/report.html.jinja", values)


def _bars(part: Widths) -> list[dict[str, Any]]:
    """A grey bar for the old size and a coloured bar for the kept size, side by side for all layers."""
    step = (_WIDTH - _MARGIN) / len(part.layers)
    inner = _HEIGHT - _MARGIN
    bars = []
    for number, (layer, left, whole) in enumerate(part.layers):
        bars.append(
            {
                "x": round(_MARGIN + number * step, 2),
                "width": round(step * 0.8, 2),
                "whole": round(inner * whole / part.size, 2),
                "left": round(inner * left / part.size, 2),
                "title": f"layer {layer}: {left} of {whole} kept",
                "label": str(layer) if number % max(1, len(part.layers) // 16) == 0 else "",
            }
        )
    return bars


def _curve(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Points in the coordinates of the chart, with the values at its edges."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    wide, tall = (_WIDTH - 2 * _MARGIN) / ((steps[-1] - steps[0]) or 1), (_HEIGHT - _MARGIN) / ((high - low) or 1)
    line = (f"{_MARGIN + (step - steps[0]) * wide:.1f},{10 + (high - loss) * tall:.1f}" for step, loss in points)
    return {"line": " ".join(line), "low": low, "high": high, "first": steps[0], "last": steps[-1]}

"""The output of a knowledge distribution analysis: its file, a table for spreadsheets, and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from secateur.analysis import Analysis, Deviation, percent
from secateur.export.sums import SUMS, write_sums
from secateur.whole import whole

_LABEL = {"kl": "KL(dense || cut), nats", "perplexity": "change of perplexity"}
_LEAST = 1e-4
"""Deviations below this share of the largest one have the lightest colour (the scale is logarithmic)."""


def write_analysis(analysis: Analysis, folder: Path, *, by: Deviation, share: float) -> None:
    """Write ``analysis.json``, ``analysis.csv``, ``heatmap.png`` and their checksums into ``folder``, atomically.

    ``folder`` is new, or empty. The picture shows the deviation ``by`` KL or perplexity, and marks the most sensitive
    ``share`` of the groups.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as scratch:
        scratch.mkdir()
        analysis.save(scratch / "analysis.json")
        _write_table(analysis, scratch / "analysis.csv")
        heat_map(analysis, scratch / "heatmap.png", by=by, protected=analysis.sensitive(share, by))
        write_sums(scratch, scratch / SUMS)


def _write_table(analysis: Analysis, path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["group", "kind", "layer", "ratio", "units", "removed", "loss", "perplexity", "kl"])
        for trial in analysis.trials:
            numbers = [trial.loss, math.exp(min(trial.loss, 700.0)), trial.kl]
            table.writerow(
                [trial.group, trial.kind, trial.layer, trial.ratio, trial.units, trial.removed]
                + [f"{number:.6g}" for number in numbers]
            )


def heat_map(analysis: Analysis, file: Path, *, by: Deviation, protected: Sequence[str] = ()) -> None:
    """Write a PNG, layer by kind, darker for more sensitive groups, with one panel for each ratio.

    Several groups of a kind in a layer are added up; ``protected`` groups are marked. Drawn without a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds = sorted({trial.kind for trial in analysis.trials})
    layers = sorted({trial.layer for trial in analysis.trials if trial.layer is not None})
    ratios = sorted({trial.ratio for trial in analysis.trials})
    grids = [_grid(analysis, by, ratio, list(kinds), layers) for ratio in ratios]
    largest = max((float(np.nanmax(grid)) for grid in grids), default=1.0) or 1.0
    width, height = 2.5 + 0.32 * max(8, len(layers)), 0.9 + len(ratios) * (0.6 + 0.45 * len(kinds))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ratios), 1, squeeze=False, sharex=True)[:, 0]
    for panel, ratio, grid in zip(panels, ratios, grids, strict=True):
        norm = LogNorm(vmin=largest * _LEAST, vmax=largest, clip=True)
        image = panel.imshow(np.maximum(grid, largest * _LEAST), norm=norm, cmap="viridis_r", aspect="auto")
        panel.set_title(f"{percent(ratio)} of each group alone", fontsize=9, loc="left")
        panel.set_yticks(range(len(kinds)), kinds)
        panel.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        for trial in analysis.trials:
            if trial.group in protected and trial.ratio == ratio and trial.layer is not None:
                where = (layers.index(trial.layer), list(kinds).index(trial.kind))
                panel.annotate("x", where, ha="center", va="center", fontsize=8, color="white")
    panels[-1].set_xlabel(f"layer{' (x: protected)' if protected else ''}")
    figure.colorbar(image, ax=list(panels), label=_LABEL[by])
    figure.savefig(file, dpi=130)


def _grid(
    analysis: Analysis, by: Deviation, ratio: float, kinds: list[str], layers: list[int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Deviation ``[kinds, layers]`` at one ratio; NaN where there is no group."""
    grid = np.full((len(kinds), len(layers)), np.nan)
    for trial in analysis.trials:
        if trial.ratio == ratio and trial.layer is not None:
            place = kinds.index(trial.kind), layers.index(trial.layer)
            before = 0.0 if np.isnan(grid[place]) else grid[place]
            grid[place] = before + analysis.deviation(trial, by)
    return grid

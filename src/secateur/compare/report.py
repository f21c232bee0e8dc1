"""A comparison as a table, a plot and a page."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.compare.rows import DENSE, Leaderboard, Retention, Row, metric_of
from secateur.export.story import show_bytes, show_count, show_number
from secateur.pages import html_page
from secateur.whole import whole, write_whole


def write_report(comparison: Leaderboard, folder: Path) -> None:
    """Write ``results.json``, ``results.csv``, ``quality.png`` and ``report.html``, each atomically."""
    write_whole(folder / "results.json", comparison.model_dump_json(indent=1) + "\n")
    table = flat(comparison)
    with whole(folder / "results.csv") as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=_names(table))
        writer.writeheader()
        writer.writerows(table)
    plot(comparison, folder / "quality.png")
    picture = base64.b64encode((folder / "quality.png").read_bytes()).decode()
    values = {
        "comparison": comparison,
        "columns": columns_of(comparison),
        "lines": shown(comparison),
        "picture": picture,
        "own_settings": _own_settings(comparison.rows),
        "other_kinds": {row.method: row.kinds for row in comparison.rows if "layer" in row.kinds},
    }
    write_whole(folder / "report.html", html_page("secateur.compare", "page.html.jinja", values))


def _own_settings(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Method → its settings. When rows of a method differ in them, the key also has the ratio."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        alike = all(other.settings == row.settings for other in rows if other.method == row.method)
        found[row.method if alike else f"{row.method} at {row.ratio:.1%}"] = row.settings
    return found


def flat(comparison: Leaderboard) -> list[dict[str, object]]:
    """One mapping of plain values a row, the dense model first."""
    table: list[dict[str, object]] = []
    for row in (comparison.dense_row, *comparison.rows):
        line: dict[str, object] = {
            "method": row.method,
            "ratio": row.ratio,
            "ratio_reached": row.reached,
            "ratio_of_decoder": row.decoder,
            "kinds": "+".join(row.kinds),
            "parameters": row.parameters,
            "pruning_steps": row.pruning_steps,
            "recovery_steps": row.recovery_steps,
            "perplexity_pruned": comparison.mean(row.pruned),
            "perplexity_recovered": comparison.mean(row.recovered),
        }
        line |= {f"pruned, {source}": row.pruned.get(source) for source in comparison.tokens}
        line |= {f"recovered, {source}": row.recovered.get(source) for source in comparison.tokens}
        for task, dense_values in comparison.dense_tasks.items():
            metric, values = metric_of(dense_values), row.tasks.get(task, {})
            if metric is not None:
                line |= {task: values.get(metric), f"{task}_stderr": values.get(f"{metric}_stderr")}
                line |= _retained(f"{task}_retention", comparison.retention(row, task))
        if comparison.dense_tasks:
            line |= _retained("retention", comparison.mean_retention(row))
        line["scoring_seconds"] = row.scoring_seconds
        line["scoring_peak_bytes"] = row.scoring_peak_bytes
        line["scoring_extra_bytes"] = row.scoring_extra_bytes
        for batch, speed in row.speed.items():
            line |= {f"{key}, {batch}": value for key, value in speed.items()}
        line["error"] = row.error
        table.append(line)
    return table


def _retained(name: str, retention: Retention | None) -> dict[str, float | None]:
    share, error = retention or (None, None)
    return {name: share, f"{name}_stderr": error}


def _names(table: Sequence[Mapping[str, object]]) -> list[str]:
    """The columns of all lines in order, the error last; a line without a result lacks those of speed."""
    names = dict.fromkeys(key for line in table for key in line if key != "error")
    return [*names, "error"]


def columns_of(comparison: Leaderboard) -> list[str]:
    """Headings of ``shown``."""
    columns = ["method", "ratio", "parameters", "steps", "perplexity before", "after recovery"]
    columns += [*comparison.dense_tasks, "retention"] if comparison.dense_tasks else []
    columns += ["scoring", "scoring memory"]
    return [*columns, "prefill", "decode"] if _timed(comparison) else columns


def _timed(comparison: Leaderboard) -> bool:
    return any(row.speed for row in comparison.rows)


def shown(comparison: Leaderboard) -> list[list[str]]:
    """The cells of the page and of the terminal's table; the dense model first."""
    return [_cells(comparison, row) for row in (comparison.dense_row, *comparison.rows)]


def _cells(comparison: Leaderboard, row: Row) -> list[str]:
    if row.error is not None:
        return [row.method, f"{row.ratio:.1%}", row.error]
    cells = [
        row.method,
        "" if row.reached is None or row.method == DENSE else f"{row.reached:.1%}",
        "" if row.parameters is None else show_count(row.parameters),
        f"{row.pruning_steps} + {row.recovery_steps}" if row.method != DENSE else "",
        _number(comparison.mean(row.pruned)),
        _number(comparison.mean(row.recovered)),
    ]
    for task in comparison.dense_tasks:
        values = row.tasks.get(task, {})
        metric = metric_of(values)
        error = values.get(f"{metric}_stderr")
        cells.append("" if metric is None else f"{values[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    if comparison.dense_tasks:
        share, error = comparison.mean_retention(row) or (None, None)
        cells.append("" if share is None else f"{share:.1%}" + ("" if error is None else f" ± {error:.1%}"))
    speed = row.speed.get("batch 1", {})
    cells.append("" if row.scoring_seconds is None else f"{row.scoring_seconds:.0f} s")
    cells.append("" if row.scoring_extra_bytes is None else f"+{show_bytes(row.scoring_extra_bytes)}")
    if _timed(comparison):
        cells += [_times(speed, "prefill_tokens_per_s"), _times(speed, "decode_tokens_per_s")]
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else show_number(value)


def _times(speed: dict[str, float], key: str) -> str:
    return f"{speed[key] / speed[f'dense_{key}']:.2f} x" if key in speed else ""


def plot(comparison: Leaderboard, path: Path) -> None:
    """Perplexity against the ratio, before and after recovery, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    dense = comparison.mean(comparison.dense)
    for ax, state, title in zip(axes, ("pruned", "recovered"), ("before recovery", "after recovery"), strict=True):
        for index, method in enumerate(dict.fromkeys(row.method for row in comparison.rows)):
            points = [
                (row.reached, value)
                for row in sorted(comparison.rows, key=lambda row: row.ratio)
                if row.method == method and (value := comparison.mean(getattr(row, state))) is not None
            ]
            if points:
                ratios, values = zip(*points, strict=True)
                ax.plot([100 * (r or 0) for r in ratios], values, marker="osD^vPX*"[index % 8], label=method)
        if dense is not None:
            ax.axhline(dense, color="grey", linewidth=1, linestyle=":", label="dense")
        ax.set(title=title, xlabel="% of all parameters removed", yscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes[0].set_ylabel("perplexity")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    with whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")

"""The report of training runs: their final metrics, settings and curves on one HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from train.config import UserError
from train.files.whole import check_new_file, write_whole
from train.report.html import document, table
from train.report.plots import COLORS, STYLES, draw, metric_order
from train.report.runs import Run, differing_settings, read_runs


def write_report(paths: Sequence[str], output: str) -> Path:
    """Writes the report of runs, finished or not, to a new HTML file and returns its path.

    Raises `UserError` where a directory is no run, or the file exists or cannot be written.
    """
    file = Path(output)
    check_new_file(file, "output")
    text = page(read_runs(paths))
    try:
        write_whole(file, text)
    except OSError as error:
        raise UserError(f"output: {output!r} cannot be written ({error.strerror}).") from error
    Console().print(f"Report written to {file}", highlight=False, soft_wrap=True)
    return file


def page(runs: Sequence[Run]) -> str:
    """Returns the whole HTML document."""
    metrics = metric_order(runs)
    images = "".join(f"<figure>{draw(m, runs)}</figure>" for m in track(metrics, "curves"))
    if len(runs) == 1:
        title, heading = runs[0].name, "Settings"
        settings = {name: [value] for name, value in runs[0].settings.items()}
    else:
        title, heading = f"{len(runs)} runs", "Settings that differ"
        settings = differing_settings(runs)
    final = {metric: [run.last(metric) for run in runs] for metric in metrics}
    final = {"steps": [max(c[0][-1] for c in run.curves.values()) for run in runs], **final}
    return document(
        title,
        _legend(runs),
        f"<h2>Final metrics</h2>{_table(final, runs)}",
        f"<h2>{heading}</h2>{_table(settings, runs) if settings else '<p>None.</p>'}",
        f"<h2>Curves</h2><div class='grid'>{images}</div>",
        width="1500px",
    )


def _legend(runs: Sequence[Run]) -> str:
    dashes = dict(zip(STYLES, ("", "6 3", "2 3", "6 3 2 3"), strict=True))
    items = []
    for number, one in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        dash = dashes[STYLES[number // len(COLORS) % len(STYLES)]]
        line = f"<path d='M0 5h26' stroke='{color}' stroke-width='3' stroke-dasharray='{dash}'/>"
        state = "" if one.finished else " (not finished)"
        swatch = f"<svg width='26' height='10'>{line}</svg>"
        items.append(f"<span>{swatch}{html.escape(one.name)}{state}</span>")
    return f"<div class='legend'>{''.join(items)}</div>"


def _table(rows: dict[str, list[Any]], runs: Sequence[Run]) -> str:
    body = [[name, *map(_shown, values)] for name, values in rows.items()]
    return table(["", *(run.name for run in runs)], body)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)

"""The page: one HTML file without scripts that needs no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from train.config import UserError
from train.files.run_directory import check_place, write_atomically
from train.report.plots import COLORS, STYLES, draw, metric_order
from train.report.runs import Run, differing_settings, read_runs

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --back: #ffffff; --line: #d0d7de; --soft: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dce2; --back: #15181c; --line: #3b424b; --soft: #1e2329 } }
body { margin: 2rem auto; max-width: 1500px; padding: 0 1.2rem; color: var(--ink);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem }
.grid svg { width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--soft) }
thead th { background: var(--soft) }
.legend { position: sticky; top: 0; background: var(--back); padding: .5rem 0; z-index: 1;
  display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; border-bottom: 1px solid var(--line) }
.legend svg { vertical-align: middle; margin-right: .4rem }
"""


def run(paths: Sequence[str], output: str) -> Path:
    """Writes the report of runs, finished or not.

    Args:
        paths: Output directories of runs.
        output: HTML file to write; it must not exist yet.

    Returns:
        The file.

    Raises:
        UserError: a directory is no run, or the file exists or cannot be written.

    Example:
        >>> run(["runs/adamw", "runs/on_dare"], "report.html")           # doctest: +SKIP
    """
    file = Path(output)
    if file.exists():
        raise UserError(f"output: {output!r} exists; nothing is overwritten.")
    check_place(file, "output")
    text = page(read_runs(paths))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"output: {output!r} cannot be written ({error.strerror}).") from error
    Console().print(f"Report written to {file}", highlight=False, soft_wrap=True)
    return file


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    metrics = metric_order(runs)
    images = "".join(f"<figure>{draw(m, runs)}</figure>" for m in track(metrics, "curves"))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    if len(runs) == 1:
        heading, settings = "Settings", {k: [v] for k, v in runs[0].settings.items()}
    else:
        heading, settings = "Settings that differ", differing_settings(runs)
    final = {metric: [run.last(metric) for run in runs] for metric in metrics}
    final = {"steps": [max(c[0][-1] for c in run.curves.values()) for run in runs], **final}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_CSS}figure {{ margin: 0 }}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>{_legend(runs)}",
        f"<h2>Final metrics</h2>{_table(final, runs)}",
        f"<h2>{heading}</h2>{_table(settings, runs) if settings else '<p>None.</p>'}",
        f"<h2>Curves</h2><div class='grid'>{images}</div></body></html>",
    ]
    return "\n".join(parts)


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
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)

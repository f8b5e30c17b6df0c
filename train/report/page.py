"""The page: curves by subject, what differs in the settings, final figures."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any

from rich.console import Console
from rich.progress import Progress

from train.report.curves import draw, style
from train.run_record import RunRecord

_NO_CURVE = ("step", "tokens_per_second")
# Sections of the page, each with how its metrics begin; the last one takes the rest.
_SECTIONS = (
    ("Loss and rewards", ("loss", "rewards/", "logps/", "entropy", "mean_token_accuracy")),
    ("Optimization", ("grad_norm", "learning_rate", "skipped_steps")),
    ("Merging", ("merge/",)),
    ("Other metrics", ("",)),
)
_FIRST = ("loss", "rewards/margins", "rewards/accuracies", "merge/alpha")
_SAME_EVERYWHERE = ("output_dir", "reference_cache")  # names of places, not settings of a run


def render(runs: Sequence[RunRecord], console: Console) -> str:
    """The HTML text for runs, from `read_runs`; the console shows how far the drawing is."""
    curves, constant = _curves(runs, console)
    names = ", ".join(run.name for run in runs)
    return Template(resources.files("train.report").joinpath("page.html").read_text()).substitute(
        title=html.escape(f"{len(runs)} runs" if len(runs) > 3 else names),
        legend=_legend(runs),
        curves=curves,
        constant=_constant_note(constant),
        final=_table(["metric", *_names(runs)], _final(runs)),
        differences=_differences_table(runs),
        settings="".join(_settings(run, index) for index, run in enumerate(runs)),
    )


def metrics_of(runs: Sequence[RunRecord]) -> list[str]:
    """Names of all metrics, without ``eval_``, in order of importance, then of first appearance."""
    found = dict.fromkeys(
        name.removeprefix("eval_") for run in runs for row in run.rows for name in row
    )
    shown = [name for name in found if name not in _NO_CURVE]
    return sorted(shown, key=lambda name: (_FIRST + tuple(shown)).index(name))


def constant_value(metric: str, runs: Sequence[RunRecord]) -> float | None:
    """The one value that a metric has in all runs, held out or not, or None."""
    values = {
        value
        for run in runs
        for name in (metric, f"eval_{metric}")
        for value in run.series(name)[1]
    }
    return values.pop() if len(values) == 1 and not math.isnan(min(values)) else None


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """Settings, and contents of inputs, that are not the same in all runs, with each run's value.

    A setting that a run's command lacks is the empty text.
    """
    sources = [
        {"command": run.command, **run.settings}
        | {f"content of {name}": digest[:12] for name, digest in run.inputs.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for source in sources for name in source)
    rows = [(name, [source.get(name, "") for source in sources]) for name in names]
    return [
        (name, values)
        for name, values in rows
        if name not in _SAME_EVERYWHERE and len({json.dumps(v, default=str) for v in values}) > 1
    ]


def _curves(runs: Sequence[RunRecord], console: Console) -> tuple[str, dict[str, float]]:
    metrics = metrics_of(runs)
    known = {metric: constant_value(metric, runs) for metric in metrics}
    constant = {metric: value for metric, value in known.items() if value is not None}
    varying = [metric for metric in metrics if metric not in constant]
    sections: dict[str, list[str]] = {title: [] for title, _ in _SECTIONS}
    with Progress(console=console, transient=True) as progress:
        for metric in progress.track(varying, description="curves"):
            title = next(t for t, starts in _SECTIONS if metric.startswith(starts))
            sections[title].append(f"<figure>{draw(metric, runs)}</figure>")
    parts = [
        f"<h2>{title}</h2><div class=grid>{''.join(panels)}</div>"
        for title, panels in sections.items()
        if panels
    ]
    return "".join(parts), constant


def _constant_note(constant: dict[str, float]) -> str:
    if not constant:
        return ""
    listed = ", ".join(f"{html.escape(name)} = {value:.4g}" for name, value in constant.items())
    return f"<p class=note>The same at every logged step of every run: {listed}.</p>"


def _legend(runs: Sequence[RunRecord]) -> str:
    items = []
    for index, run in enumerate(runs):
        colour, dashes = style(index)
        pattern = f' stroke-dasharray="{" ".join(map(str, dashes))}"' if dashes else ""
        last = f"{run.rows[-1]['step']:.0f} steps"
        state = last if run.finished else f"{last}, not finished"
        items.append(
            f'<li><svg width=32 height=10><line x1=0 x2=32 y1=5 y2=5 stroke="{colour}" '
            f"stroke-width=3{pattern} /></svg> <b>{html.escape(run.name)}</b> "
            f"<span>{html.escape(run.command)}, {state}</span></li>"
        )
    return "".join(items)


def _final(runs: Sequence[RunRecord]) -> list[list[str]]:
    """The last value of every metric; held-out ones first."""
    metrics = metrics_of(runs)
    names = [f"eval_{metric}" for metric in metrics] + metrics
    rows = [["steps", *(f"{run.rows[-1]['step']:.0f}" for run in runs)]]
    for name in names:
        last = [run.series(name)[1][-1:] for run in runs]
        if any(last):
            rows.append([name, *(f"{value[0]:.5g}" if value else "" for value in last)])
    return rows


def _differences_table(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return ""
    rows = [[name, *map(_shown, values)] for name, values in differences(runs)]
    heading = "<h2>What differs in the settings</h2>"
    if not rows:
        return f"{heading}<p>Nothing: the runs have the same settings and inputs.</p>"
    return heading + _table(["setting", *_names(runs)], rows)


def _settings(run: RunRecord, index: int) -> str:
    rows = [[name, _shown(value)] for name, value in run.settings.items()]
    summary = f"Settings of {html.escape(run.name)}"
    path = f"<p class=note>{html.escape(str(run.path))}</p>"
    return (
        f"<details><summary>{summary}</summary>{path}{_table(['setting', 'value'], rows)}</details>"
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    return [run.name for run in runs]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value or "—"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class=scroll><table><thead>{line(headings, 'th')}</thead>{body}</table></div>"

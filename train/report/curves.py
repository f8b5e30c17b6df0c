"""Curves as SVG that takes its text colour from the page, so that it is legible on light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from train.run_record import RunRecord

# Okabe and Ito's colours but for black and yellow, which one of the two backgrounds swallows.
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#8A8A8A",
    "#9B6DD6",
)
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
"""Dash patterns as SVG and matplotlib have them; runs beyond the colours take the next one."""

_TEXT = "#010203"  # stands for the page's own colour until the SVG is written
_SMOOTHED_FROM, _WINDOW = 100, 25  # points of a curve; share of them averaged
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT
    ),
}


def style(index: int) -> tuple[str, tuple[int, ...]]:
    """Colour and dash pattern of the run of that number."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def draw(metric: str, runs: Sequence[RunRecord]) -> str:
    """One panel: a metric in training as lines, and held out as lines with dots.

    Args:
        metric: Its name in training; ``eval_`` is put before it for the other.
        runs: Those to compare; the ones that lack the metric are left out.

    Returns:
        An ``<svg>`` element. The same runs give the same text.
    """
    with matplotlib.rc_context({**_RC, "svg.hashsalt": metric}):
        figure = matplotlib.figure.Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            _plot(axes, run, metric, index)
        axes.set_title(metric, loc="left", fontsize=10, weight="bold")
        axes.set_xlabel("step")
        axes.grid(color=_TEXT, alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(style="sci", scilimits=(-3, 5), axis="y", useOffset=False)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue().replace(_TEXT, "currentColor")
    return text[text.index("<svg") :]


def _plot(axes: Axes, run: RunRecord, metric: str, index: int) -> None:
    colour, dashes = style(index)
    line = {"color": colour, "linestyle": (0, dashes) if dashes else "-"}
    steps, values = run.series(metric)
    if len(values) >= _SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
        values = smoothed(values)
    # A line through one point is invisible.
    alone = "x" if len(values) == 1 else None
    axes.plot(steps, values, linewidth=1.3, marker=alone, **line)
    steps, values = run.series(f"eval_{metric}")
    axes.plot(steps, values, linewidth=1.3, marker="o", markersize=3.5, **line)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window centred on each value, 1/25 of the curve wide; NaN only where all are.

    At the ends the window is cut, not filled, so that no value is made up.
    """
    array = np.asarray(values, np.float64)
    half = max(1, len(array) // _WINDOW // 2)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(np.arange(len(array)) - half, 0)
    stop = np.minimum(np.arange(len(array)) + half + 1, len(array))
    count = counts[stop] - counts[start]
    mean = (sums[stop] - sums[start]) / np.maximum(count, 1)
    return np.where(count > 0, mean, math.nan).tolist()

"""Curves of several runs as SVG images that take the colours of the page around them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from train.report.runs import Run

COLORS = ("#4477aa", "#ee6677", "#228833", "#bb8800", "#3aa6c9", "#aa3377", "#888888", "#e07b39")
"""Colours to tell apart on white and on black, by colour-blind readers too (Tol's bright set)."""
STYLES = ("-", "--", ":", "-.")
_INK = "#808183"  # replaced by the page's own colour
_SMOOTH_FROM = 80
_FIRST = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")
_LAST = ("tokens_per_second", "learning_rate")


def metric_order(runs: Sequence[Run]) -> list[str]:
    """Orders the metrics: what a reader looks for first, then held-out, other and merge metrics."""
    names = {name for run in runs for name in run.curves}
    rank = {name: i for i, name in enumerate(_FIRST)}

    def key(name: str) -> tuple[int, int, str]:
        plain = name.removeprefix("eval_")
        group = 1 if name.startswith("eval_") else 3 if name.startswith("merge/") else 2
        group = 0 if name in rank else 4 if name in _LAST else group
        return group, rank.get(plain, len(rank)), name

    return sorted(names, key=key)


def draw(metric: str, runs: Sequence[Run]) -> str:
    """Draws one metric of all runs that have it, as an ``<svg>`` element.

    Long noisy curves are drawn faint with a running mean on top. `runs` are all runs of the report, so
    that a run has one colour in all images.
    """
    # Text stays text: small, and it can be searched and selected.
    style: Any = {"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    style |= {"svg.hashsalt": metric, "text.color": _INK, "axes.labelcolor": _INK}
    with rc_context(style):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(runs):
            if metric in run.curves:
                steps, values = run.curves[metric]
                _line(axes, steps, values, number)
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, color=_INK)
        axes.tick_params(colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _line(axes, steps: list[float], values: list[float], number: int) -> None:
    look = {"color": COLORS[number % len(COLORS)], "linewidth": 1.6}
    look["linestyle"] = STYLES[number // len(COLORS) % len(STYLES)]
    if len(values) == 1:
        axes.plot(steps, values, marker="o", markersize=4, **look)
        return
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, **look)
        return
    axes.plot(steps, values, **{**look, "alpha": 0.25, "linewidth": 0.8})
    axes.plot(steps, running_mean(values, max(3, len(values) // 40)), **look)


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Averages the finite values at most ``half`` places away; NaN where there is none."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means

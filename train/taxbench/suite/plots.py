"""Figures of the suite: gains of all methods with every seed shown, and one plot for every study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from train.taxbench.miniature.plot import tidy
from train.taxbench.suite.outcome import Outcome
from train.taxbench.suite.selection import Entry
from train.taxbench.suite.statistics import mean_sd

# Okabe and Ito's colours, which stay apart under colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "oDs^vP"


def draw_first(outcome: Outcome, rows: Sequence[Entry], path: Path) -> None:
    """Draws the gain over AdamW at the reward level of every method: mean, and a dot for every seed.

    Methods that reach the level on less than half of AdamW's seeds are left out, as a mean of one or
    two seeds would lead the figure. A number of seeds that is smaller than AdamW's is shown.
    """
    base = next(row for row in rows if row.group == "adamw")
    zero = outcome.matched(base, outcome.seeds)
    of_base, shown = int(np.isfinite(zero).sum()), {}
    for row in rows:
        gains = 100 * (outcome.matched(row, outcome.seeds) - zero)
        count = int(np.isfinite(gains).sum())
        if row.key != base.key and count and 2 * count >= of_base:
            fewer = f" ({count} of {of_base} seeds)" if count < of_base else ""
            shown[f"{row.label}{fewer}"] = gains, row
    ordered = sorted(shown.items(), key=lambda item: float(np.nanmean(item[1][0])))
    figure = matplotlib.figure.Figure(
        figsize=(9, 1.2 + 0.34 * max(len(ordered), 3)), layout="constrained"
    )
    axes = figure.subplots()
    axes.axvline(0, color="#000000", linewidth=1)
    for place, (_, (values, row)) in enumerate(ordered):
        colour = "#8A8A8A" if row.control else "#0072B2"
        known = values[np.isfinite(values)]
        axes.plot(known, np.full(len(known), place), "o", color=colour, alpha=0.35, markersize=5)
        axes.plot(known.mean(), place, "D", color=colour, markersize=8)
    axes.set_yticks(range(len(ordered)), [label for label, _ in ordered])
    axes.set_xlabel(
        f"points of capability over AdamW at reward {outcome.config.reward:g} (dots: seeds; "
        "diamond: mean)"
    )
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_study(outcome: Outcome, rows: Sequence[Entry], path: Path) -> None:
    """Draws matched capability, and the last step's reward, along the axis of a study.

    The group of an entry is its line, the label its place on the axis.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = list(dict.fromkeys(row.label for row in rows))
    for index, line in enumerate(dict.fromkeys(row.group for row in rows)):
        style = {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "capsize": 3,
            "label": line,
        }
        own = [row for row in rows if row.group == line]
        # A little to the side of one another, so that bars do not cover each other.
        x = np.array([places.index(row.label) for row in own]) + 0.08 * (index - 1)
        matched = [outcome.matched(r, outcome.study_seeds) for r in own]
        rewards = [outcome.results.last(r.key, outcome.study_seeds)[:, 0] for r in own]
        for axes, values, scale in ((left, matched, 100), (right, rewards, 1)):
            mean, sd, _ = np.array([mean_sd(v) for v in values]).T
            axes.errorbar(x, scale * mean, yerr=scale * np.nan_to_num(sd), **style)
    for axes, title in (
        (left, f"capability % at reward {outcome.config.reward:g}"),
        (right, "reward at the last step"),
    ):
        axes.set_xticks(range(len(places)), places)
        tidy(axes, title)
        axes.margins(x=0.08)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
